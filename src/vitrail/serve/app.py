"""The routes of the server, and how errors become responses."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable
from importlib import resources
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vitrail.data.formats import register_heif
from vitrail.errors import ConfigError, PictureError, VitrailError
from vitrail.serve import responses
from vitrail.serve.batching import Batcher, BusyError, Lane
from vitrail.serve.model_data import Gallery
from vitrail.serve.models import MissingError, Shelf
from vitrail.serve.parameters import Question, read_question
from vitrail.serve.responses import Seen
from vitrail.serve.security import Bodies, Guard, RefusedError

log = logging.getLogger("vitrail")

MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
"""Media types of the live page's files, by suffix."""
WATCHED_EVERY = 0.1
"""Seconds between checks whether a client has disconnected."""
T = TypeVar("T")


class Server:
    """The models, the threads that work for them, and the handlers of the routes."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._bodies, self._batcher = Bodies(), Batcher()
        # A map that takes many passes must not delay a cheap one, nor a large file a small one.
        self._reading = Lane(limit=256, threads=2)
        self._quick, self._slow = Lane(limit=64), Lane(limit=16)
        self._data, self._evaluating = Lane(limit=64, threads=4), Lane(limit=16)
        self._gallery = Gallery(shelf)
        self._evaluations: dict[str, asyncio.Task[None]] = {}
        folder = resources.files("vitrail.serve") / "page"
        self._files = {
            file.name: file.read_bytes()
            for file in folder.iterdir()
            if file.name.rpartition(".")[2] in MEDIA_TYPES
        }

    def close(self) -> None:
        """Finish what is running."""
        for task in self._evaluations.values():
            task.cancel()
        lanes = self._reading, self._quick, self._slow, self._data, self._evaluating
        for lane in (*lanes, self._batcher):
            lane.close()

    async def models(self, _request: Request) -> Response:
        """Answer GET /api/models: the names, the default one first, and which are runs."""
        names = self._shelf.names()
        runs = [name for name in names if self._shelf.run_folder(name)]
        return JSONResponse({"models": names, "runs": runs})

    async def model(self, request: Request) -> Response:
        """Answer GET /api/models/NAME: classes, sizes and checkpoints of one model."""
        name = request.path_params["name"]
        return JSONResponse(await self._reading.run(self._describe, name))

    def _describe(self, name: str) -> dict[str, Any]:
        described = responses.describe(name, self._shelf.get(name))
        return described | {"steps": self._shelf.steps(name)}

    async def predict(self, request: Request) -> Response:
        """Answer POST /api/predict: the most probable classes."""
        question, seen = await self._look(request)
        return JSONResponse(await self._predict(question, seen))

    async def explain(self, request: Request) -> Response:
        """Answer POST /api/explain: the same, and the maps of one method."""
        question, seen = await self._look(request)
        answer = await self._predict(question, seen)
        if question.slow:
            found = await self._run_slowly(request, responses.explanation, seen, question)
        else:
            found = await self._quick.run(responses.explanation, seen, question)
        return JSONResponse(answer | found)

    async def curve(self, request: Request) -> Response:
        """Answer POST /api/curve: the probability while a map's highest patches are hidden."""
        question, seen = await self._look(request)
        found = await self._run_slowly(request, responses.removal_curves, seen, question)
        return JSONResponse(found)

    async def page(self, request: Request) -> Response:
        """Answer POST /api/page: everything about one picture as one HTML file."""
        question, seen = await self._look(request)
        html = await self._run_slowly(request, responses.page, seen, question)
        # The page has its own content policy, which allows only its own script.
        headers = {"Content-Disposition": 'attachment; filename="explanation.html"'}
        return Response(html, media_type="text/html; charset=utf-8", headers=headers)

    async def file(self, request: Request) -> Response:
        """Answer GET / and GET /page/NAME: the files of the live page, and no others."""
        name = request.path_params.get("name", "index.html")
        if name not in self._files:
            raise MissingError(f"no file {name[:60]!r}")
        kind = MEDIA_TYPES[name.rpartition(".")[2]]
        return Response(self._files[name], media_type=kind)

    async def examples(self, request: Request) -> Response:
        """Answer GET /api/models/NAME/examples: the class of each example picture."""
        found = await self._data.run(self._gallery.examples, request.path_params["name"])
        return JSONResponse({"examples": found})

    async def example(self, request: Request) -> Response:
        """Answer GET /api/models/NAME/examples/N: an example picture as a PNG."""
        path = request.path_params
        png = await self._data.run(self._gallery.example, path["name"], path["index"])
        return Response(png, media_type="image/png")

    async def picture(self, request: Request) -> Response:
        """Answer GET /api/models/NAME/pictures/N: a validation image as a PNG."""
        path = request.path_params
        png = await self._data.run(self._gallery.picture, path["name"], path["index"])
        return Response(png, media_type="image/png")

    async def confusion(self, request: Request) -> Response:
        """Answer GET /api/models/NAME/confusion: the counts so far; evaluation continues."""
        name = request.path_params["name"]
        found = await self._data.run(self._gallery.confusion, name)
        task = self._evaluations.get(name)
        if found["evaluated"] < found["images"] and (task is None or task.done()):
            self._evaluations[name] = asyncio.create_task(self._evaluate(name))
        return JSONResponse(found)

    async def _evaluate(self, name: str) -> None:
        with contextlib.suppress(VitrailError):  # the next request reports it
            while not await self._evaluating.run(self._gallery.evaluate, name):
                pass

    async def cell(self, request: Request) -> Response:
        """Answer GET /api/models/NAME/confusion/LABEL/PREDICTED: the pictures of a cell."""
        path = request.path_params
        asked = path["name"], path["label"], path["predicted"]
        return JSONResponse({"pictures": await self._data.run(self._gallery.cell, *asked)})

    async def run(self, request: Request) -> Response:
        """Answer GET /api/models/NAME/run: the epochs of a run so far."""
        found = await self._data.run(self._gallery.run, request.path_params["name"])
        return JSONResponse(found)

    async def _predict(self, question: Question, seen: Seen) -> dict[str, Any]:
        outputs = await self._batcher.outputs(seen.classifier, seen.raw_HWC)
        return responses.predictions(seen, *outputs, question)

    async def _run_slowly(
        self, request: Request, work: Callable[[Seen, Question], T], seen: Seen, question: Question
    ) -> T:
        """Run slow work, unless the client disconnects before it starts."""
        gone = threading.Event()

        async def watch() -> None:
            while not await request.is_disconnected():
                await asyncio.sleep(WATCHED_EVERY)
            gone.set()

        def start() -> T:
            if gone.is_set():
                raise ClientDisconnect
            return work(seen, question)

        watching = asyncio.create_task(watch())
        try:
            return await self._slow.run(start)
        finally:
            watching.cancel()

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
        name = question.model or self._shelf.default()
        return responses.look(self._shelf.get(name, question.step), body, question)


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
            Route("/api/predict", server.predict, methods=post),
            Route("/api/explain", server.explain, methods=post),
            Route("/api/curve", server.curve, methods=post),
            Route("/api/page", server.page, methods=post),
            Route("/", server.file),
            Route("/page/{name}", server.file),
            Route("/api/models", server.models),
            Route("/api/models/{name}", server.model),
            Route("/api/models/{name}/examples", server.examples),
            Route("/api/models/{name}/examples/{index:int}", server.example),
            Route("/api/models/{name}/pictures/{index:int}", server.picture),
            Route("/api/models/{name}/confusion", server.confusion),
            Route("/api/models/{name}/confusion/{label:int}/{predicted:int}", server.cell),
            Route("/api/models/{name}/run", server.run),
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
            return Response(status_code=400)  # nobody receives it
        case _:  # from the model or its data: the message may contain a path on this machine
            log.warning("%s", error)
            return JSONResponse({"error": "the request failed: see the server's log"}, 500)
    return JSONResponse({"error": str(error)}, status, headers)


def _fail(_request: Request, _error: Exception) -> Response:
    """Answer after an unexpected error, whose traceback is in the log."""
    return JSONResponse({"error": "internal error: see the server's log"}, 500)
