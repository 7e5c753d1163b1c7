"""A Flask app that streams answers: all threads share one runtime, and a client that leaves frees its context.

python examples/web/flask_app.py build/smart-home
curl --no-buffer --data "turn off the lamp in the hall" localhost:5000/command

With several processes, which share the mapped base:
gunicorn --workers 2 --threads 4 --pythonpath examples/web 'flask_app:open_app("build/smart-home")'
"""

import sys
from itertools import chain

from edgetune_runtime import BusyError, EdgetuneError, NotFoundError, Runtime, UsageError
from flask import Flask, Response, request

STATUS = {BusyError: 503, NotFoundError: 404, UsageError: 400}


def create_app(runtime: Runtime) -> Flask:
    """An app whose POST /ADAPTER answers the prompt in its body; `runtime` stays open as long as the app runs."""
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = 100_000

    @app.post("/<adapter>")
    def answer(adapter: str) -> Response:
        stream = runtime.stream(request.get_data(as_text=True), adapter=adapter, max_tokens=200)
        # Wait for the first piece, so that an error can still set the status.
        first = next(stream, "")
        response = Response(chain([first], stream), mimetype="text/plain")
        response.call_on_close(stream.close)
        return response

    @app.errorhandler(EdgetuneError)
    def refuse(error: EdgetuneError) -> tuple[str, int]:
        return f"{error}\n", next((STATUS[kind] for kind in STATUS if isinstance(error, kind)), 500)

    return app


def open_app(bundle: str) -> Flask:
    """The app of one of several processes, which has to call this itself: a runtime cannot be forked."""
    return create_app(Runtime.open(bundle, threads=1, repack=False, contexts=1))


if __name__ == "__main__":
    with Runtime.open(sys.argv[1]) as opened:
        create_app(opened).run()
