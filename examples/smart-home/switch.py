"""Answer one prompt with the plain base and with each adapter of a bundle, and print the time of each switch."""

import argparse
import sys
from pathlib import Path

from edgetune_runtime import EdgetuneError, Runtime
from edgetune_runtime.bundle import read_manifest

PROMPT = "turn off the lamp in the hall"


def main() -> None:
    """Open the bundle once per format, and switch for each answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", help="the bundle's folder, such as build/smart-home")
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--engine", help="gguf or onnx (default: all that the bundle has)")
    options = parser.parse_args()
    print(f"> {options.prompt}")
    engines = [options.engine] if options.engine else list(read_manifest(Path(options.bundle)).base.files)
    for engine in engines:
        print(f"with {engine}:")
        with Runtime.open(options.bundle, engine=engine) as runtime:
            for name in (None, *runtime.adapters):
                answer = runtime.generate(options.prompt, adapter=name, max_tokens=40)
                times = answer.timings
                took = f"switch {times.switch_us:.0f} µs, first token {times.ttft_ms:.0f} ms"
                print(f"{name or '(base)':8} {' '.join(answer.text.split())}")
                print(f"{'':8} {took}, {times.tokens_per_s:.0f} tokens/s")


if __name__ == "__main__":
    try:
        main()
    except EdgetuneError as error:
        sys.exit(f"error: {error}")
