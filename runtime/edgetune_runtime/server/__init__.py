"""An HTTP server for one bundle that speaks the APIs of OpenAI and Ollama (extra `server`)."""
