"""``vitrail explain``."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from vitrail.cli.console import print_err, print_out, progress_bar
from vitrail.cli.explain_files import (
    NUMBERS,
    SETTINGS,
    given,
    is_file_name,
    name_files,
    name_table,
    view_of,
)
from vitrail.cli.explain_flags import list_methods, list_variants, read_numbers, read_query
from vitrail.cli.options import (
    STDIN,
    DataOptions,
    PictureOptions,
    check_images,
    list_pictures,
    load_image,
    load_model,
    take_model,
)
from vitrail.cli.parsing import parse
from vitrail.config.drawing import Look
from vitrail.errors import ConfigError, PictureError, printable
from vitrail.explain.map_settings import (
    CLASSLESS,
    REMOVAL,
    SIGNED,
    SUPPORTED_SETTINGS,
    MapSettings,
    settings_of_all,
)

if TYPE_CHECKING:
    from vitrail.explain.explanation import Explanation, Subject
    from vitrail.inference.classifier import Classifier
    from vitrail.model.vit import VisionTransformer

PROG = "vitrail explain"


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
@dataclass(frozen=True)
class ExplainOptions(PictureOptions):
    """Show what a model looked at in a picture.

    The flags that most people need:
      --method                  relevance, rollout, occlusion, ...; several: a,b; or all
      --format, --output_path   gif, png, html (a page to explore), ...; a file or a folder
      --class, --against        explain another class, or the difference between two
      --frames                  what varies: rollout, layers, heads, queries or training
      --index, --split          an image of the model's data, with its label
      --score                   measure which maps to trust
      --theme, --colormap       colors

    For example:
      vitrail explain cat.jpg
      vitrail explain output/quick cat.jpg --method relevance --class dog --output_path cat.gif
      vitrail explain photos/ --method all
      vitrail explain cat.jpg --format html
      vitrail explain output/quick --score
    """

    index: int | None = None
    """Explain image N of the model's data (see --split) instead of a file."""
    score: bool = False
    """Measure on a dataset how far the maps can be trusted: tables and plots."""
    images: int = 200
    """Number of images for --score."""
    json: bool = False
    """Print the numbers of --score as JSON on standard output."""
    method: str | None = None
    """attention, rollout, gradient_rollout, relevance, gradcam, balanced, integrated_gradients,
    occlusion, shapley; several: a,b; or all (of these). Views of the tokens: features, similarity,
    norms. Default: balanced, traced back through the layers; with --score, all. With --score also
    variants: occlusion:window=1,rollout:fusion=norm. vitrail info lists those that fail a test."""
    frames: str | None = None
    """What varies between frames: rollout, layers, heads, queries or training. Default: depends on
    the method."""
    format: Literal["gif", "webp", "png", "svg", "pdf", "html", "npz", "csv"] | None = None
    """Output format; npz and csv hold the numbers. Default: from the extension of --output_path,
    else gif."""
    output_path: Path | None = None
    """File, or folder for several pictures (several pictures with several methods make one
    sheet, in png, svg or pdf). Default: output/explain."""
    layers: str | None = None
    """Layers, counted from 1; for example, 2,4-6. Default: all."""
    heads: str | None = None
    """Heads, counted from 1; for example, 1,3. Default: all."""
    class_name: Annotated[str | None, tyro.conf.arg(name="class")] = None
    """The class to explain. Default: the predicted one."""
    against: str | None = None
    """A second class: explain the difference between the scores of the two."""
    query: str | None = None
    """ROW,COLUMN, from 0, of a patch: show what it attends to, or what is similar to it.
    Default: what the head reads; for similarity, the central patch."""
    fusion: Literal["mean", "max", "min", "norm"] = "mean"
    """How the heads are combined; norm (rollout only): by the size of what each token adds."""
    discard_ratio: float = 0.0
    """Fraction of each layer's attention entries, the lowest, that a rollout drops."""
    gradients: Literal["plain", "balanced"] = "plain"
    """Gradients of relevance: plain, or with frozen gates, norms and attention."""
    points: int | None = None
    """Average the gradients of balanced and integrated_gradients over N points between a blank
    picture and this one. Default: 1 for balanced, 16 for integrated_gradients."""
    resolution: Literal["pixel", "patch"] = "pixel"
    """Values of balanced and integrated_gradients per pixel, or summed over patches."""
    window: int = 2
    """Side, in patches, of the squares that occlusion hides and shapley shows as a unit."""
    passes: int = 512
    """Maximum forward passes of shapley per picture; at least two per square are made."""
    drawing: Look = field(default_factory=Look)
    data: DataOptions = field(default_factory=DataOptions)

    @property
    def folder(self) -> Path:
        """The folder of the output files."""
        asked = self.output_path
        if asked is None:
            return Path("output") / "explain"
        return asked.parent if is_file_name(asked) else asked


def command(args: Sequence[str]) -> int:
    """Run ``vitrail explain``."""
    options = take_model(parse(ExplainOptions, args, prog=PROG))
    _check(options)
    names = list_pictures(options.pictures)
    classifier = load_model(options, files=bool(names), needs_classes=options.score)
    if not classifier.classes:
        options = _for_no_classes(options)
    if options.score:
        from vitrail.cli.score import score

        methods = list_variants(options.method)
        folder, as_json = options.folder, options.json
        return score(classifier, methods, options.data, options.images, folder, as_json=as_json)
    return _draw_all(classifier, names, options)


def _for_no_classes(options: ExplainOptions) -> ExplainOptions:
    """Return the options for a network without classes: by default, views of its tokens.

    Raises:
        ConfigError: a class is named.
    """
    for name, value in (("class", options.class_name), ("against", options.against)):
        if value is not None:
            raise ConfigError(f"the model has no classes: leave out --{name}")
    asked = options.output_path
    if "html" in (options.format, asked and asked.suffix.lower().removeprefix(".")):
        return options  # a page has every method
    return replace(options, method=view_of(options, has_classes=False)[0])


def _check(options: ExplainOptions) -> None:
    """Refuse flags that exclude each other."""
    count = bool(options.pictures) + (options.index is not None) + options.score
    if count == 0:
        raise ConfigError(f"no picture given: {PROG} PICTURE, or --index N, or --score")
    if count > 1:
        raise ConfigError("a picture, --index and --score cannot be combined: give one of them")
    # Without --score, too: to report errors before a model is loaded.
    (list_variants if options.score else list_methods)(options.method)
    if options.score:
        chosen = ("frames", "format", "class_name", *SETTINGS)
        _refuse_idle(
            options,
            chosen,
            vars(options.drawing),
            "--score measures methods with default settings, or as --method METHOD:NAME=VALUE",
        )
        check_images(options.images)
        if options.output_path is not None and is_file_name(options.output_path):
            raise ConfigError(
                f"--score writes scores.json and plots: {options.output_path} is a file, "
                "give a folder"
            )
    else:
        _refuse_idle(options, ("images", "json"), (), "only for --score")
        if options.index is None:
            words = "pictures are explained, not the model's data"
            _refuse_idle(options, (), (), words, data=vars(options.data))


def _refuse_idle(
    options: ExplainOptions, chosen: Iterable[str], drawing: Iterable[str], why: str,
    *, data: Iterable[str] = (),
) -> None:  # fmt: skip
    """Refuse flags, by their fields' names, that were given but would have no effect."""
    idle = given(options, chosen) + given(options.drawing, drawing) + given(options.data, data)
    if idle:
        flags = ", ".join(f"--{name.removesuffix('_name')}" for name in idle)
        raise ConfigError(f"{why}: leave out {flags}")


def _draw_all(classifier: "Classifier", names: Sequence[str], options: ExplainOptions) -> int:
    """Explain the pictures that can be read; report what was drawn, and where.

    One picture is in memory at a time, unless several share a sheet or colors.
    """
    from vitrail.explain.draw import check_rows
    from vitrail.explain.explanation import share_colors

    methods, several = list_methods(options.method), len(names) > 1
    table = name_table(options) if several and len(methods) > 1 else None
    if table:
        check_rows(len(names))
    stems = ["stdin" if name == STDIN else name for name in names] or [_name_of_index(options)]
    paths = [table] if table else name_files(options, stems)
    _check_drawing(classifier, options, paths[0].suffix.lower())  # all have the same
    broken: list[str] = []
    found = _read_subjects(classifier, names, options, broken)
    if several and "features" in methods:
        numbers, subjects = [], []
        for number, subject in found:
            numbers.append(number)
            subjects.append(subject)
        found = zip(numbers, share_colors(subjects) if subjects else (), strict=True)
    if table:
        _draw_table(classifier, [subject for _, subject in found], table, options)
    else:
        for number, subject in found:
            _draw(classifier, subject, paths[number], options)
    if len(broken) == max(1, len(names)):
        raise PictureError(broken[0])
    for message in broken:
        print_err(f"vitrail: {message}")
    return 1 if broken else 0


def _draw_table(
    classifier: "Classifier", subjects: "Sequence[Subject]", path: Path, options: ExplainOptions
) -> None:
    """Draw one sheet with a row per picture and a column per method."""
    from vitrail.explain.draw import save_table

    explanations = []
    for subject in subjects:
        explanations.append(_explain_one(classifier, subject, options))
        _print_prediction(explanations[-1])
    if not explanations:
        return
    _print_failures(explanations[0])
    save_table(explanations, path, options.drawing)
    pictures = f"{len(explanations)} picture{'s' if len(explanations) > 1 else ''}"
    shape = f"{pictures}, {len(explanations[0].frames)} methods"
    print_out(f"{printable(str(path))}: {shape}, {path.stat().st_size / 1000:,.0f} kB")


def _print_prediction(explanation: "Explanation") -> None:
    """Print a picture's name and prediction, and whether it is unlike the training images."""
    last = explanation.frames[-1]
    style = {True: "green", False: "bold red", None: ""}[last.correct]
    name = printable(explanation.subject.name)
    if not last.prediction:
        return
    print_out(f"{name}: {printable(last.prediction)}", style=style)
    if unlike := explanation.subject.unlike:
        print_out(f"{name}: {unlike}", style="yellow")


def _draw(
    classifier: "Classifier", subject: "Subject", path: Path, options: ExplainOptions
) -> None:
    """Explain one picture and report what was drawn."""
    from vitrail.explain.draw import save

    explanation = _explain_one(classifier, subject, options)
    save(explanation, path, options.drawing)
    _print_prediction(explanation)
    if path.suffix.lower() != ".html":  # a page shows badges
        _print_failures(explanation)
    size = f"{path.stat().st_size / 1000:,.0f} kB"
    print_out(f"{printable(str(path))}: {_describe(explanation, path)}, {size}")


def _print_failures(explanation: "Explanation") -> None:
    """Name the methods that fail a test on this model, by its stored scores."""
    failing = {frame.title: frame.failures for frame in explanation.frames if frame.failures}
    if failing and explanation.kind == "methods":
        verb = "fails" if len(failing) == 1 else "fail"
        print_err(f"{', '.join(failing)} {verb} a test on this model (see vitrail info)")
    elif failing:
        words = ", ".join(next(iter(failing.values())))
        print_err(f"{explanation.settings.method} fails a test on this model: {words}")


def _describe(explanation: "Explanation", path: Path) -> str:
    """Return what a file holds."""
    if path.suffix.lower() == ".html":
        return "a page with methods, layers and heads to choose from"
    titles = explanation.titles
    if len(titles) == 1:
        return f"1 map, {titles[0]}"
    return f"{len(titles)} maps, {titles[0]} to {titles[-1]}"


def _explain_one(
    classifier: "Classifier", subject: "Subject", options: ExplainOptions
) -> "Explanation":
    """Compute the maps that the flags ask for."""
    from vitrail.explain.explanation import choose, compare, explain

    methods, settings = list_methods(options.method), _read_settings(options, subject)
    if len(methods) > 1:
        if options.frames is not None:
            raise ConfigError("with several methods each is one frame: leave out --frames")
        supported = [SUPPORTED_SETTINGS[method] for method in methods]
        idle = set(SETTINGS).difference(*supported)
        _refuse_idle(options, sorted(idle), (), f"no effect on {options.method}")
        if all("resolution" in names for names in supported):
            settings.setdefault("resolution", "pixel")
        several = settings_of_all(methods, **settings)
        with _show_passes([subject.model], several):
            return compare(subject, several, class_name=options.class_name)
    asked, frames = view_of(options, has_classes=bool(subject.classes))
    method, kind = choose(methods[0] if methods else asked, frames)  # type: ignore[arg-type]
    checkpoints = _list_checkpoints(classifier, options.device) if kind == "training" else []
    chosen = MapSettings(method=method, **settings)
    models = [model for _, model in checkpoints] or [subject.model]
    with _show_passes(models, [chosen]):
        return explain(
            subject, chosen, kind=frames, class_name=options.class_name, checkpoints=checkpoints
        )


@contextmanager
def _show_passes(
    models: "Sequence[VisionTransformer]", several: Sequence[MapSettings]
) -> Iterator[None]:
    """Show a progress bar of the passes that hide patches, for occlusion and Shapley values."""
    from vitrail.explain.removal import count_passes

    slow = [each for each in several if each.method in REMOVAL]
    total = sum(count_passes(model.config.grid_GJ, each) for model in models for each in slow)
    with progress_bar("hiding patches", total) if slow else nullcontext() as move:
        # Only this command uses these models, so the hooks affect nothing else.
        hooks = [
            model.register_forward_hook(lambda _, __, logits_BY: move(len(logits_BY)))
            for model in models
            if move
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _read_settings(options: ExplainOptions, subject: "Subject") -> dict[str, Any]:
    """Return the settings that were given, as fields of ``MapSettings``."""
    settings = {name: getattr(options, name) for name in given(options, SETTINGS)}
    readers: dict[str, Callable[[str], object]] = {
        "query": read_query,
        "layers": partial(read_numbers, "layers"),
        "heads": partial(read_numbers, "heads"),
        "against": subject.find_class,
    }
    for name in readers.keys() & settings:
        settings[name] = readers[name](settings[name])
    return settings


def _list_checkpoints(
    classifier: "Classifier", device: str
) -> "list[tuple[str, VisionTransformer]]":
    """Load all checkpoints of the run, with their epochs as titles."""
    from vitrail.training.run_folder import is_run_folder, read_rows
    from vitrail.training.state import checkpoint_folders
    from vitrail.weights.checkpoint import step_of
    from vitrail.weights.pretrained import load

    source = Path(classifier.source)
    if not is_run_folder(source):
        return []
    epochs = {row["step"]: row["epoch"] for row in read_rows(source)}
    loaded = []
    for folder in checkpoint_folders(source / "checkpoints"):
        step = step_of(folder) or 0
        title = f"epoch {epochs[step]}" if step in epochs else f"update {step}"
        loaded.append((title, load(folder, device=device).model))
    return loaded


def _read_subjects(
    classifier: "Classifier", names: Sequence[str], options: ExplainOptions, broken: list[str]
) -> "Iterator[tuple[int, Subject]]":
    """Read the pictures one by one, each with its number; append the errors of others to broken."""
    if options.index is not None:
        yield 0, indexed(classifier, options)
    for number, name in enumerate(names):
        try:
            if name == STDIN:
                yield number, classifier.subject(sys.stdin.buffer.read(), name="stdin")
            else:
                yield number, classifier.subject(name)
        except PictureError as error:
            broken.append(str(error))


def _name_of_index(options: ExplainOptions) -> str:
    return f"{options.data.split}-{options.index}"


def indexed(classifier: "Classifier", options: ExplainOptions) -> "Subject":
    """Return one image of the model's data, with its label."""
    from PIL import Image

    from vitrail.weights.pretrained import of_model_size

    index = options.index
    assert index is not None
    raw_HWC, label = load_image(
        classifier, options.data, index, folder=options.folder, purpose=f"image {index} explained"
    )
    # As a picture, since the axes of a small array may be ambiguous.
    picture, name = Image.fromarray(raw_HWC), _name_of_index(options)
    return of_model_size(classifier).subject(picture, name=name, label=label)


# --- reading flags --------------------------------------------------------------------------------


def _check_drawing(classifier: "Classifier", options: ExplainOptions, suffix: str) -> None:
    """Refuse flags that would have no effect on the drawing."""
    drawing = vars(options.drawing)
    if suffix == ".html":
        from vitrail.explain.large_page import is_large

        # The page of a large network has single patches in some layers only, which can be chosen.
        effective = {"layers"} if is_large(classifier.model.config) else set()
        idle = [name for name in ("method", "frames", *SETTINGS) if name not in effective]
        words = "a page has methods, layers and heads to choose from"
        _refuse_idle(options, idle, drawing, words)
        return
    if suffix in NUMBERS:
        _refuse_idle(options, (), drawing, f"{suffix} holds the numbers, which are not drawn")
    elif suffix not in (".gif", ".webp"):
        _refuse_idle(options, (), ("duration", "loop"), f"{suffix} is not animated")
    if options.drawing.style == "reference":
        words = "style reference dims the picture, without colors"
        _refuse_idle(options, (), ("colormap", "alpha"), words)
    methods: list[str] = [*list_methods(options.method)] or [view_of(options)[0] or "rollout"]
    if options.class_name is not None and set(methods) <= set(CLASSLESS):
        raise ConfigError(
            f"{', '.join(methods)} is the same for every class: leave out --class, or use "
            "--method relevance, balanced or another one"
        )
    if given(options.drawing, ["colormap"]) and set(methods) <= {*SIGNED, "features"}:
        raise ConfigError(
            f"--colormap has no effect on signed maps or features ({', '.join(methods)}): leave it "
            "out, or use --method relevance, rollout or another one"
        )
