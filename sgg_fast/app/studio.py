"""Holds the model and draws one request after the other: a queue, replaced and stopped drawings, previews.

It is independent of HTTP. The page is up before torch is imported. Only the thread that loads the model imports torch,
because the libraries' lazy modules do not support two importing threads.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import logging
import secrets
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from sgg_fast.commands import NotFiniteError

if TYPE_CHECKING:
    from sgg_fast.data.inputs import Item
    from sgg_fast.drawing import Model, Options, Step

logger = logging.getLogger(__name__)

MAX_WAITING = 32
"""Most drawings in the queue; more are refused."""
KEPT = 16
"""Finished drawings whose pictures can still be fetched."""
MAX_PICTURES = 8
"""Most pictures of one drawing: one batch of infer.py."""
PREVIEW_SHARE = 0.12
"""Largest share of a drawing's time that previews take."""
SETTINGS = ("seed", "num_images", "steps", "guidance", "relation_guidance", "scheduler", "size")
"""Settings of a request, by the names of `drawing.Options`."""


class BusyError(Exception):
    """The queue is full."""


class _StopError(Exception):
    """Raised within a drawing to end it."""


@dataclasses.dataclass
class Drawing:
    """One request and its state."""

    id: str
    page: str
    item: Item
    options: Options
    maps_wanted: bool
    state: str = "waiting"
    """waiting, drawing; then done, stopped, replaced or failed."""
    step: int = 0
    steps: int = 0
    preview: str = ""
    """JPEG in base64 of the picture as it was last predicted."""
    preview_step: int = 0
    error: str = ""
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    pictures: list[bytes] = dataclasses.field(default_factory=list)
    maps: dict[str, Any] | None = None
    seconds: float = 0.0
    ending: str = ""
    """The requested end: stopped or replaced; "" for none."""

    @property
    def is_over(self) -> bool:
        return self.state not in ("waiting", "drawing")


class Studio:
    """Loads the model behind the page and draws. All public methods may be called from any thread."""

    def __init__(self, model: str | None) -> None:
        self.asked, self.failure = model, ""
        self.model: Model | None = None
        self._change = threading.Condition()
        self._line: list[Drawing] = []
        self._drawings: OrderedDict[str, Drawing] = OrderedDict()
        self._words: dict[str, Any] = {}
        self._scheduler: Any = None
        self._closing = False
        self.readable, self.drawable, self.ready = threading.Event(), threading.Event(), threading.Event()
        """Set when graphs can be read, when requests can be checked, and when the model is loaded or has failed."""
        self._thread = threading.Thread(target=self._work, name="studio", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the current drawing after its step, and the thread."""
        with self._change:
            self._closing = True
            for drawing in self._drawings.values():
                drawing.ending = drawing.ending or "stopped"
            self._change.notify_all()

    def about(self) -> dict[str, Any]:
        """The model for the page: its words and its default settings."""
        if self.model is None:
            return {"state": "failed" if self.failure else "loading", "error": self.failure}
        return {"state": "ready", **self._words}

    def submit(self, page: str, item: Item, options: Options, maps_wanted: bool) -> Drawing:
        """Queue a drawing; it replaces an older one of the same page ("" for none). Raises `BusyError`."""
        if self.failure:
            raise BusyError(self.failure)
        with self._change:
            replaced = [d for d in self._drawings.values() if page and d.page == page and not d.is_over]
            if len(self._line) - sum(d.state == "waiting" for d in replaced) >= MAX_WAITING:
                raise BusyError(f"{MAX_WAITING} drawings wait already; try again in a while")
            for older in replaced:
                self._end(older, "replaced")
            drawing = Drawing(secrets.token_hex(8), page, item, options, maps_wanted)
            self._line.append(drawing)
            self._drawings[drawing.id] = drawing
            over = [d.id for d in self._drawings.values() if d.is_over]
            for old in over[: max(len(over) - KEPT, 0)]:
                del self._drawings[old]
            self._change.notify_all()
            return drawing

    def find(self, id: str) -> Drawing | None:
        with self._change:
            return self._drawings.get(id)

    def stop(self, drawing: Drawing) -> None:
        """End it after its current step."""
        with self._change:
            self._end(drawing, "stopped")

    def progress(self, drawing: Drawing, seen: int) -> dict[str, Any]:
        """Its state for the page, with the preview if that is newer than step `seen`."""
        with self._change:
            state: dict[str, Any] = {"id": drawing.id, "state": drawing.state, "step": drawing.step}
            state |= {"steps": drawing.steps, "seconds": round(drawing.seconds, 2), "error": drawing.error}
            state["ahead"] = self._line.index(drawing) if drawing in self._line else 0
            if drawing.preview_step > seen and not drawing.is_over:
                state |= {"preview": drawing.preview, "preview_step": drawing.preview_step}
            if drawing.state == "done":
                state |= {"records": drawing.records, "maps": drawing.maps}
            return state

    def _end(self, drawing: Drawing, state: str) -> None:
        """The caller holds the lock."""
        if drawing.state == "waiting":
            self._line.remove(drawing)
            drawing.state = state
        elif not drawing.is_over:
            drawing.ending = drawing.ending or state

    def _work(self) -> None:
        from sgg_fast.quiet import uncollected

        try:
            with uncollected():
                self._load()
        except (ValueError, OSError) as error:
            self.failure = " ".join(str(error).split())
        except Exception as error:  # border: a library that does not import, say; waiting requests must end
            logger.exception("the model was not loaded")
            self.failure = f"the model was not loaded: {type(error).__name__}: {error}"
        for event in (self.readable, self.drawable, self.ready):
            event.set()
        if self.failure:
            return
        while True:
            with self._change:
                self._change.wait_for(lambda: self._line or self._closing)
                if self._closing:
                    return
                drawing = self._line.pop(0)
                drawing.state = "drawing"
            self._draw(drawing)

    def _load(self) -> None:
        import sgg_fast.app.reading  # noqa: F401 - the readers of graphs

        self.readable.set()
        from sgg_fast.quiet import quiet_libraries

        quiet_libraries()
        from sgg_fast import drawing
        from sgg_fast.data.text_form import PREDICATES
        from sgg_fast.drawing.jobs import unexplained
        from sgg_fast.drawing.models import scheduler_name
        from sgg_fast.drawing.options import SCHEDULERS
        from sgg_fast.drawing.vocabulary import vocabulary

        self.drawable.set()
        model = drawing.load_model(self.asked)
        pipeline = model.pipeline
        pipeline.set_progress_bar_config(disable=True)
        # Drawings replace the scheduler; each begins with the model's own, as a command does.
        self._scheduler, config = pipeline.scheduler, pipeline.config
        own, words = scheduler_name(pipeline), vocabulary(pipeline.graph_encoder.config.trained_names)
        self._words = {
            "model": model.name,
            "description": model.description,
            "weights": model.weights,
            "words": words | {"predicates": words["predicates"] or sorted(PREDICATES)},
            "schedulers": list(dict.fromkeys([own, *SCHEDULERS])),
            "defaults": {"seed": 0, "num_images": 1, "steps": config.sampling_steps, "guidance": config.guidance,
                         "relation_guidance": 0.0, "scheduler": own, "size": config.resolution},
            "max_pictures": MAX_PICTURES,
            "explains": not unexplained(pipeline),
        }  # fmt: skip
        self.model = model

    def _draw(self, drawing: Drawing) -> None:
        began = time.monotonic()
        try:
            self._sample(drawing, began)
            end = "done"
        except _StopError:
            end = drawing.ending
        except (ValueError, NotFiniteError) as error:
            drawing.error, end = " ".join(str(error).split()), "failed"
        except Exception as error:  # border: whatever a library raises ends this drawing only
            logger.exception("a drawing failed")
            drawing.error, end = f"the model failed: {type(error).__name__}: {error}"[:300], "failed"
        with self._change:
            drawing.state, drawing.preview, drawing.seconds = end, "", time.monotonic() - began

    def _sample(self, drawing: Drawing, began: float) -> None:
        from sgg_fast.data.png_record import encode_png
        from sgg_fast.drawing import make_records, sample
        from sgg_fast.drawing.explain import token_labels

        assert self.model is not None
        self.model.pipeline.scheduler = self._scheduler
        graph = drawing.item.graph
        records = make_records(graph, drawing.item.settings, self.model, drawing.options)
        due = [0.0]

        def on_step(step: Step) -> None:
            if drawing.ending:
                raise _StopError
            now = time.monotonic()
            drawing.step, drawing.steps, drawing.seconds = step.number, step.total, now - began
            if now >= due[0] and step.number < step.total:
                try:
                    preview = jpeg(step.preview())
                except NotFiniteError:
                    return  # an early step's prediction may be; the last one decides
                cost = time.monotonic() - now
                due[0] = now + max(cost / PREVIEW_SHARE, 0.25)
                with self._change:
                    drawing.preview, drawing.preview_step = preview, step.number

        explain = drawing.maps_wanted and self._words["explains"]
        images, maps = sample([graph] * len(records), records, self.model, on_step, explain=explain)
        if drawing.ending:
            raise _StopError
        if maps is not None:
            drawing.maps = packed_maps(maps, [token for _, token in token_labels(graph)])
        drawing.pictures = [encode_png(image, record) for image, record in zip(images, records, strict=True)]
        drawing.records = records


def jpeg(image: Any) -> str:
    """The picture as JPEG in base64, at most 512 pixels a side."""
    image.thumbnail((512, 512))
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=85)
    return base64.b64encode(file.getvalue()).decode()


def packed_maps(maps_BThw: Any, tokens: list[int]) -> dict[str, Any]:
    """Attention of each object, then each relation, for every picture: its heat as bytes 0..255 in base64, stretched to
    its own range as on the sheet of --explain, and its mean share of the attention."""
    chosen = maps_BThw[:, tokens].float()
    low, high = chosen.amin(dim=(2, 3), keepdim=True), chosen.amax(dim=(2, 3), keepdim=True)
    levels = ((chosen - low) / (high - low).clamp(min=1e-12) * 255).round().byte()
    height, width = levels.shape[2:]
    return {
        "height": height,
        "width": width,
        "heat": [[base64.b64encode(m.numpy().tobytes()).decode() for m in picture] for picture in levels],
        "share": [[round(float(m.mean()), 4) for m in picture] for picture in chosen],
    }
