"""A bundle in, one prompt answered by the plain base and by each of its adapters out, with what each switch took."""

import argparse
import sys

from edgetune_runtime import EdgetuneError, Runtime

PROMPT = "turn off the lamp in the hall"


def main() -> None:
    """Open the bundle once, switch for each answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", help="the bundle's folder, such as build/smart-home")
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    options = parser.parse_args()
    with Runtime.open(options.bundle) as runtime:
        print(f"> {options.prompt}")
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
