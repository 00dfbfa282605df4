"""The routes of the server, and how errors become answers."""

import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vitrail.data.formats import register_heif
from vitrail.errors import ConfigError, PictureError, VitrailError
from vitrail.serve import answers
from vitrail.serve.answers import Seen
from vitrail.serve.guard import Bodies, Guard, RefusedError
from vitrail.serve.lanes import Batcher, BusyError, Lane
from vitrail.serve.models import MissingError, Shelf
from vitrail.serve.questions import Question, read_question

log = logging.getLogger("vitrail")


class Server:
    """The models, the threads that work for them, and the handlers of the routes."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._bodies, self._batcher = Bodies(), Batcher()
        # A map of many passes must not delay a cheap one, nor a large file a small one.
        self._reading = Lane(limit=256, threads=2)
        self._quick, self._slow = Lane(limit=64), Lane(limit=16)

    def close(self) -> None:
        """Finish what is running."""
        for lane in (self._reading, self._quick, self._slow, self._batcher):
            lane.close()

    async def models(self, _request: Request) -> Response:
        """Answer GET /api/models: the names, the default one first."""
        return JSONResponse({"models": self._shelf.names()})

    async def model(self, request: Request) -> Response:
        """Answer GET /api/models/NAME: classes, sizes and checkpoints of one model."""
        name = request.path_params["name"]
        return JSONResponse(await self._reading.run(self._describe, name))

    def _describe(self, name: str) -> dict[str, Any]:
        described = answers.describe(name, self._shelf.get(name))
        return described | {"steps": self._shelf.steps(name)}

    async def predict(self, request: Request) -> Response:
        """Answer POST /api/predict: the most probable classes."""
        question, seen = await self._look(request)
        return JSONResponse(await self._predict(question, seen))

    async def explain(self, request: Request) -> Response:
        """Answer POST /api/explain: the same, and the maps of one method."""
        question, seen = await self._look(request)
        answer = await self._predict(question, seen)
        lane = self._slow if question.slow else self._quick
        return JSONResponse(answer | await lane.run(answers.explanation, seen, question))

    async def curve(self, request: Request) -> Response:
        """Answer POST /api/curve: the probability while a map's highest patches are hidden."""
        question, seen = await self._look(request)
        return JSONResponse(await self._slow.run(answers.removal_curves, seen, question))

    async def page(self, request: Request) -> Response:
        """Answer POST /api/page: everything about one picture as one HTML file."""
        question, seen = await self._look(request)
        html = await self._slow.run(answers.page, seen, question)
        # The page has a policy of its own, which allows its own script only.
        headers = {"Content-Disposition": 'attachment; filename="explanation.html"'}
        return Response(html, media_type="text/html; charset=utf-8", headers=headers)

    async def _predict(self, question: Question, seen: Seen) -> dict[str, Any]:
        found_Y = await self._batcher.probabilities(seen.classifier, seen.raw_HWC)
        return answers.predictions(seen, found_Y, question)

    async def _look(self, request: Request) -> tuple[Question, Seen]:
        """Read a request: its question, and its picture as the model sees it."""
        question = read_question(request.query_params.multi_items())
        body = await self._bodies.read(request)
        self._batcher.reading += 1
        try:
            return question, await self._reading.run(self._open, body, question)
        finally:
            self._batcher.reading -= 1

    def _open(self, body: bytes, question: Question) -> Seen:
        name = question.model or self._shelf.names()[0]
        return answers.look(self._shelf.get(name, question.step), body, question)


def build_app(shelf: Shelf, host: str) -> Starlette:
    """Return the application that serves the models of a shelf on a host's address."""
    register_heif()
    server = Server(shelf)

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        server.close()

    post = ["POST"]
    return Starlette(
        routes=[
            Route("/api/models", server.models),
            Route("/api/models/{name}", server.model),
            Route("/api/predict", server.predict, methods=post),
            Route("/api/explain", server.explain, methods=post),
            Route("/api/curve", server.curve, methods=post),
            Route("/api/page", server.page, methods=post),
        ],
        middleware=[Middleware(Guard, host=host)],
        exception_handlers={
            VitrailError: _refuse,
            RefusedError: _refuse,
            HTTPException: _refuse,
            ClientDisconnect: _refuse,
            Exception: _fail,
        },
        lifespan=lifespan,
    )


def _refuse(_request: Request, error: Exception) -> Response:
    """Answer a request that was refused, with the reason."""
    headers = {}
    match error:
        case BusyError():
            status, headers = 503, {"Retry-After": "1"}
        case MissingError():
            status = 404
        case PictureError() | ConfigError():
            status = 400
        case RefusedError():
            status = error.status
        case HTTPException():
            return JSONResponse({"error": error.detail}, error.status_code, error.headers)
        case ClientDisconnect():
            return Response(status_code=400)  # nobody reads it
        case _:  # of the model or its data: the message may name a path of this machine
            log.warning("%s", error)
            return JSONResponse({"error": "it failed: see the server's log"}, 500)
    return JSONResponse({"error": str(error)}, status, headers)


def _fail(_request: Request, _error: Exception) -> Response:
    """Answer after an unexpected error, whose traceback is in the log."""
    return JSONResponse({"error": "an error in the server: see its log"}, 500)
