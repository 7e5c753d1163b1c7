"""The base's GGUF file, from which every format is made: conversion, quantization, and copies with merged adapters."""
