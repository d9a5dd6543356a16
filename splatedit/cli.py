"""The words on the command line. Only click and the standard library are imported here, so that --help is instant."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import click

from splatedit import __version__
from splatedit.config import GUIDANCES, KEYS, UPS, Config, colour, load_config
from splatedit.errors import CRASH, INTERRUPTED, MISTAKE, ExposedWarning, InputError, LossWarning, OutOfMemory

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # a full or failing disk is nobody's mistake
PLAIN = (LossWarning, ExposedWarning)  # warnings that are for the user, whatever line they come from
HERE = "127.0.0.1"  # where the viewer is served: to this machine alone
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def setting(*names: str, key: str, **more: Any) -> Callable:
    """A click option for one key of Config, with the key's own help text and default."""
    default = getattr(Config, key)
    shown = "" if default in (None, "") or more.get("is_flag") else f"  [default: {default}]"
    return click.option(*names, key, default=None, help=KEYS[key] + shown, **more)


def list_keys() -> str:
    """All settings with their defaults, for the end of `splatedit run --help`."""
    words = {None: "null", True: "true", False: "false"}
    lines = ["\b", "All settings, for --config files and key=value words:"]
    for key, value in vars(Config()).items():
        if key not in ("scene", "prompt"):
            shown = words[value] if value is None or isinstance(value, bool) else value
            lines.append(f"  {f'{key}={shown}':<30}{KEYS[key]}")
    return "\n".join(lines)


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, "--version", message="splatedit %(version)s", help="print the version and stop")
@click.help_option("-h", "--help", help="print this and stop")
def cli() -> None:
    """Edit 3D Gaussian splats with text: one splat file and one prompt in, one splat file out."""


@cli.command(context_settings=CONTEXT, epilog=list_keys())
@click.argument("scene", metavar="SCENE", required=False)
@click.argument("prompt", metavar="PROMPT", required=False)
@click.argument("words", nargs=-1, metavar="[KEY=VALUE]...")
@setting("--source-prompt", "--src-prompt", key="source_prompt", metavar="TEXT")
@setting("--guidance", key="guidance", metavar="NAME")
@setting("--guidance-scale", key="guidance_scale", type=float, metavar="NUMBER")
@setting("--model", key="model", metavar="NAME|FOLDER")
@setting("--steps", key="steps", type=int, metavar="N")
@setting("--seed", key="seed", type=int, metavar="N")
@setting("--preset", key="preset", metavar="NAME")
@setting("--solver", key="solver", metavar="NAME")
@setting("--fpr-iters", key="fpr_iters", type=int, metavar="N")
@setting("--fpr-lambda", key="fpr_lambda", type=float, metavar="NUMBER")
@setting("--source-cache", key="source_cache", type=int, metavar="N")
@setting("--cache-mb", key="cache_mb", type=float, metavar="NUMBER")
@setting("-o", "--output-dir", key="output_dir", metavar="FOLDER")
@setting("--device", key="device", metavar="NAME")
@setting("--cameras", key="cameras", metavar="RIG|FILE")
@setting("--up", key="up", metavar="AXIS")
@setting("--mask", key="mask", metavar="FILE")
@setting("--mask-box", key="mask_box", metavar="CX,CY,CZ,SX,SY,SZ")
@setting("--mask-sphere", key="mask_sphere", metavar="X,Y,Z,R")
@setting("--mask-rule", key="mask_rule", metavar="RULE")
@setting("--mask-text", key="mask_text", metavar="auto|WORDS")
@setting("--grow-percent", key="grow_percent", type=float, metavar="NUMBER")
@setting("--max-gaussians", key="max_gaussians", type=int, metavar="N")
@setting("--vram", key="vram", type=int, metavar="GB")
@setting("--offline", key="offline", is_flag=True)
@setting("--viewer/--no-viewer", key="viewer", is_flag=True)
@click.option("--host", metavar="ADDRESS", help="with --viewer: as of `splatedit view`")
@click.option("--port", type=int, metavar="N", help="with --viewer: as of `splatedit view`")
@click.option("--config", "file", metavar="FILE", help="yaml file of settings, such as the config.yaml of another run")
@click.option(
    "--resume",
    is_flag=False,
    flag_value="",
    metavar="[PATH]",
    help="go on with a run that was cut off: its folder; without PATH the newest of this scene and prompt",
)
@click.option("--dry-run", is_flag=True, help="print the plan: cameras, evaluations, time, memory; write nothing")
@click.option("--json", "as_json", is_flag=True, help="with --dry-run: as JSON")
@click.help_option("-h", "--help", help="print this and stop")
def run(
    scene: str | None,
    prompt: str | None,
    words: tuple[str, ...],
    file: str | None,
    resume: str | None,
    dry_run: bool,
    as_json: bool,
    host: str | None,
    port: int | None,
    **given: Any,
) -> None:
    """Edit SCENE, a splat file, until it shows PROMPT.

    Settings are merged in this order, later ones win: defaults, --config FILE, options, KEY=VALUE words. The edited
    splats and everything about the run go to a new folder OUTPUTS/SCENE/PROMPT@TIME; the path of edited.ply is the last
    line on stdout, all else goes to stderr. Ctrl-C keeps what is done so far and writes it. With --resume, a run that
    was cut off goes on in its own folder with its own settings; SCENE and PROMPT can be left out.

    Exit status: 0 edited; 2 a mistake in what was asked; 3 written, but nothing changed or the edit went to noise;
    130 interrupted.
    """
    if (as_json and not dry_run) or (dry_run and resume is not None):
        other = "--json goes with --dry-run" if as_json else "--dry-run plans a new run, --resume goes on with one"
        raise click.UsageError(f"{other}.", click.get_current_context())
    if resume is None:
        for name, value in (("SCENE", scene), ("PROMPT", prompt)):
            if value is None:
                raise click.UsageError(f"Missing argument '{name}'.", click.get_current_context())
        folder, config = None, load_config(file, {**given, "scene": scene, "prompt": prompt}, words)
    else:
        folder, config = resumed(resume, [w for w in (scene, prompt, *words) if w is not None], file, given)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads sleep instead of spinning
    if dry_run:
        from splatedit.preflight import tell

        tell(config, as_json)
        return
    command = ["splatedit", *sys.argv[1:]]
    if config.viewer:
        from splatedit.viewer.shell import watch

        outcome = watch(config, click.echo, command=command, resume=folder, host=host or HERE, port=port or 0)
        sys.exit(outcome.status)
    if host is not None or port is not None:
        raise click.UsageError("--host and --port go with --viewer.", click.get_current_context())
    from splatedit.run import run as start

    outcome = start(config, command=command, resume=folder)
    click.echo(str(outcome.edited))
    sys.exit(outcome.status)


@cli.command(context_settings=CONTEXT)
@click.argument("file")
@click.argument("other", metavar="[FILE2]", required=False)
@click.option("--host", default=HERE, show_default=True, metavar="ADDRESS", help="0.0.0.0: other machines can reach it")
@click.option("--port", type=int, default=0, show_default=True, metavar="N", help="0: any free one")
@click.option(
    "--open/--no-browser", "open_browser", default=None, help="open a browser, or do not; else on a screen only"
)
@click.option("--up", type=click.Choice(UPS), default=None, help="up axis; else the scene's sidecar says, else guessed")
@click.help_option("-h", "--help", help="print this and stop")
def view(file: str, other: str | None, **given: Any) -> None:
    """Look at FILE, a splat file, in a browser, and edit it there; with FILE2: compare the two.

    Prints the address, which holds a secret: whoever has it may edit, and read and write files here. Runs until Ctrl-C.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from splatedit.viewer.shell import show

    show(file, other, click.echo, **given)


def like_run(command: click.Command) -> click.Command:
    """Give a command the settings of `splatedit run` as options, but those that it has itself."""
    own = {parameter.name for parameter in command.params}
    shared = [p for p in run.params if isinstance(p, click.Option) and (p.name in KEYS or p.name == "file")]
    command.params[-1:-1] = [p for p in shared if p.name not in own and p.name != "viewer"]
    return command


@like_run
@cli.command(context_settings=CONTEXT)
@click.argument("scene")
@click.argument("prompt")
@click.argument("words", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--views", type=click.IntRange(1, 4), default=4, show_default=True, metavar="N", help="how many, 1 to 4")
@click.option(
    "--steps", type=click.IntRange(1), default=20, show_default=True, metavar="N", help="steps of each picture"
)
@click.help_option("-h", "--help", help="print this and stop")
def preview(
    scene: str, prompt: str, words: tuple[str, ...], views: int, steps: int, file: str | None, **given: Any
) -> None:
    """Edit a few views of SCENE as pictures until they show PROMPT: what `splatedit run` would do, in seconds.

    Takes the options and settings of `splatedit run`: the same guidance, prompts, cameras and mask. Writes one sheet,
    OUTPUTS/SCENE/PROMPT@TIME.preview.png, with each view before and after; its path is the last line on stdout. Exit
    status as of `splatedit run`.
    """
    config = load_config(file, {**given, "scene": scene, "prompt": prompt}, words)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from splatedit.preview import preview as start

    made = start(config, views, steps)
    click.echo(str(made.sheet))
    sys.exit(made.status)


def resumed(path: str, words: list[str], file: str | None, given: dict[str, Any]) -> tuple[str, Config]:
    """Where to go on, and the settings of that run with those merged in that are given now; raises InputError.

    path: what followed --resume, which may be meant for SCENE or a KEY=VALUE word; empty if nothing did.
    """
    from splatedit import folders

    is_scene = os.path.isfile(path) and not path.endswith(".pt")
    if is_scene or ("=" in path and not os.path.exists(path)):
        path, words = "", [path, *words]
    pairs = [word for word in words if word.partition("=")[0].isidentifier() and "=" in word]
    others = [word for word in words if word not in pairs]
    if len(others) > 2:
        raise InputError(f"{others[2]!r}: expected key=value (a prompt of several words needs quotes).")
    options = {**given, **dict(zip(("scene", "prompt"), others, strict=False))}
    folder = folders.find(path or None, load_config(file, options, pairs))
    before = load_config(folder / "config.yaml")
    return path or str(folder), load_config(file, options, pairs, before)


@cli.command(context_settings=CONTEXT)
@click.option("--json", "as_json", is_flag=True, help="print JSON")
@click.help_option("-h", "--help", help="print this and stop")
def doctor(as_json: bool) -> None:
    """Say whether splatedit can run here, and what to do if not: torch, GPU, gsplat, renderer, models, disk.

    One line for each: ok, warning or fails. gsplat's CUDA extension is built if it has not been, which takes minutes.
    Exit status 0 if splatedit can run here, 1 if not.
    """
    from splatedit.doctor import doctor as start

    sys.exit(start(click.echo, as_json))


@cli.command(context_settings=CONTEXT)
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
@click.help_option("-h", "--help", help="print this and stop")
def info(file: str, as_json: bool) -> None:
    """Say what is in FILE, a splat file: how many splats, where, how large, which extra columns."""
    from splatedit.info import describe, format

    description = describe(file)
    if as_json:
        import json

        click.echo(json.dumps(description, indent=1))
    else:
        click.echo(format(description))


@cli.command(context_settings=CONTEXT)
@click.argument("source", metavar="A")
@click.argument("target", metavar="B")
@click.option(
    "--sh-degree", type=click.IntRange(0, 3), metavar="N", help="drop spherical harmonics above, or add zeros"
)
@click.option("--up", type=click.Choice(UPS), default=None, help="turn the scene so that this axis is up in B")
@click.help_option("-h", "--help", help="print this and stop")
def convert(source: str, target: str, sh_degree: int | None, up: str | None) -> None:
    """Write splat file A as B: the ending of B says the format.

    Formats: .ply, .compressed.ply (SuperSplat), .splat, .spz, .sog; also read: checkpoints of gsplat (.pt) and
    nerfstudio (.ckpt). What B cannot hold is said on stderr. Cameras that belong to A do not fit B once --up has turned
    the scene. The path of B is the last line on stdout.
    """
    from splatedit.conversion import convert_file

    for line in convert_file(source, target, sh_degree, up):
        click.echo(line, err=True)
    click.echo(target)


@cli.command(context_settings=CONTEXT)
@click.argument("scene")
@click.argument("words", nargs=-1, metavar="[KEY=VALUE]...")
@setting("--mask", key="mask", metavar="FILE")
@setting("--mask-box", key="mask_box", metavar="CX,CY,CZ,SX,SY,SZ")
@setting("--mask-sphere", key="mask_sphere", metavar="X,Y,Z,R")
@setting("--mask-rule", key="mask_rule", metavar="RULE")
@setting("--mask-text", key="mask_text", metavar="auto|WORDS")
@click.option("-o", "--output", multiple=True, metavar="FILE", help="mask (.json .npy), picture, film or splat file")
@setting("--prompt", key="prompt", metavar="TEXT")
@setting("--source-prompt", "--src-prompt", key="source_prompt", metavar="TEXT")
@setting("--model", key="model", metavar="NAME|FOLDER")
@setting("--seed", key="seed", type=int, metavar="N")
@setting("--device", key="device", metavar="NAME")
@setting("--up", key="up", metavar="AXIS")
@setting("--offline", key="offline", is_flag=True)
@click.option("--config", "file", metavar="FILE", help="yaml file of settings, such as the config.yaml of another run")
@click.help_option("-h", "--help", help="print this and stop")
def mask(scene: str, words: tuple[str, ...], output: tuple[str, ...], file: str | None, **given: Any) -> None:
    """Choose splats of SCENE, a splat file, and say how many: those that an edit shall be free to change.

    Takes the mask options and settings of `splatedit run`; several hold together, all at once. --output, as often as
    wanted: .json the mask, for --mask; .npy a truth value for each splat; .png, .mp4, .gif, .apng the scene with the
    mask in colour; a splat file those splats alone. The paths, one a line, are all that stdout gets.
    """
    config = load_config(file, {**given, "scene": scene}, words)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from rich.console import Console

    from splatedit.mask_run import make

    for path in make(config, output, Console(stderr=True, highlight=False, soft_wrap=True)):
        click.echo(str(path))


@cli.command(context_settings=CONTEXT)
@click.argument("file")
@click.option("-o", "--output", required=True, metavar="PATH", help="film (.mp4 .gif .apng), one .png, or a folder")
@click.option("--cameras", metavar="FILE|FOLDER", help="draw from these cameras instead of a circle")
@click.option("--frames", type=click.IntRange(1), default=72, show_default=True, help="views around the circle")
@click.option("--size", default="512", show_default=True, metavar="N|WxH", help="of the pictures, in pixels")
@click.option("--elevation", type=float, default=15.0, show_default=True, help="degrees above the horizon")
@click.option("--azimuth", type=float, default=0.0, show_default=True, help="degrees at which the circle begins")
@click.option("--fov", type=click.FloatRange(1, 170), default=45.0, show_default=True, help="field of view, degrees")
@click.option("--zoom", type=click.FloatRange(0.01), default=1.0, show_default=True, help="2 is twice as close")
@click.option("--up", type=click.Choice(UPS), default=None, help="up axis; else the scene's sidecar says, else guessed")
@click.option("--background", default="1,1,1", show_default=True, metavar="R,G,B", help="in [0, 1]")
@click.option("--fps", type=click.FloatRange(1, 120), default=24.0, show_default=True, help="frames per second")
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda or cuda:N")
@click.help_option("-h", "--help", help="print this and stop")
def render(
    file: str, output: str, cameras: str | None, frames: int, size: str, background: str, fps: float, **view: Any
) -> None:
    """Draw FILE, a splat file, from a circle of cameras around it, or from cameras of your own.

    The ending of the output says what is made: .mp4, .gif or .apng a turntable; .png the first view alone; a name
    without ending a folder of numbered PNGs. The path is the last line on stdout. --cameras: cameras.json,
    transforms.json or a COLMAP folder; all views in the order of their names, or --frames of them, evenly; --size N is
    then the shorter edge of a picture in its own shape.
    """
    if cameras is not None:
        chosen = [name for name in ("elevation", "azimuth", "fov", "zoom", "up") if was_given(name)]
        if chosen:
            raise InputError(f"--{chosen[0]}: has no meaning with --cameras, whose file says where to look from.")
    pixels, behind = read_size(size), read_colour(background)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from splatedit import media
    from splatedit.camera_files import fit
    from splatedit.cameras import orbit
    from splatedit.captures import load_capture, spread
    from splatedit.editing import resolve_device
    from splatedit.files import load, sidecar

    media.check_target(output)
    device = resolve_device(view.pop("device"))
    up = view.pop("up") or sidecar(file).up
    gaussians = load(file)
    if cameras is None:
        views = orbit(gaussians, frames, size=pixels, up=up, **view)
    else:
        capture = load_capture(cameras, gaussians, file)
        chosen = spread(capture.views, frames if was_given("frames") else len(capture.views))
        views = fit(chosen, *pixels) if "x" in size.lower() else capture.whole(chosen, pixels[0])
    media.save_frames(media.draw(gaussians.to(device), views, behind), output, fps)
    click.echo(output)


@cli.command(context_settings=CONTEXT)
@click.argument("picture")
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option("--source", metavar="TEXT", help="what the picture shows now; without it the model finds out")
@click.option("--guidance", default="ids", show_default=True, metavar="NAME", help=", ".join(GUIDANCES))
@click.option("--compare", metavar="NAME,NAME", help="edit by several guidances, side by side in grid.png")
@click.option("--guidance-scale", type=float, metavar="NUMBER", help="1 is off; else what suits model and guidance")
@click.option("--model", default="pocket", show_default=True, metavar="NAME|FOLDER", help=KEYS["model"])
@click.option("--steps", type=int, metavar="N", help="steps of gradient descent; else as published, 200")
@click.option("--rate", type=float, metavar="NUMBER", help="step length per gradient; else as published, 0.0488")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help=KEYS["seed"])
@click.option("--solver", default="grad", show_default=True, metavar="NAME", help=KEYS["solver"])
@click.option("--fpr-iters", type=int, default=3, show_default=True, metavar="N", help=KEYS["fpr_iters"])
@click.option("--fpr-lambda", type=float, default=1.0, show_default=True, metavar="NUMBER", help=KEYS["fpr_lambda"])
@click.option("--batch", type=int, default=4, show_default=True, metavar="N", help="pictures edited at once")
@click.option("--fit", type=click.Choice(["crop", "stretch"]), default="crop", show_default=True, help="into a square")
@click.option("-o", "--output-dir", default="outputs", show_default=True, metavar="FOLDER", help=KEYS["output_dir"])
@click.option("--device", default="auto", show_default=True, metavar="NAME", help=KEYS["device"])
@click.option("--offline", is_flag=True, help=KEYS["offline"])
@click.help_option("-h", "--help", help="print this and stop")
def image(picture: str, prompts: tuple[str, ...], guidance: str, compare: str | None, **given: Any) -> None:
    """Edit PICTURE, a file or a folder of pictures, until it shows PROMPT; several prompts give several edits.

    Pictures are cut to a square of the model's size. The edited pictures, a labelled grid.png beside the sources and
    metrics.json go to a new folder OUTPUTS/PICTURE/PROMPT@TIME; the paths of the edited pictures, one a line, are all
    that stdout gets. Exit status as of `splatedit run`.
    """
    guidances = tuple(name.strip() for name in compare.split(",")) if compare is not None else (guidance,)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from splatedit.image_run import ImageOptions, edit_files

    options = ImageOptions(picture, prompts, guidances=guidances, **given)
    outcome = edit_files(options, command=["splatedit", *sys.argv[1:]])
    for path in outcome.files:
        click.echo(str(path))
    sys.exit(outcome.status)


@cli.command(context_settings=CONTEXT)
@click.argument("path", metavar="SCENE|IMAGE")
@click.argument("prompt")
@click.option(
    "--source", default=None, metavar="TEXT", help="what is to be seen now; else the sidecar or the model says"
)
@click.option("-o", "--output", default=None, metavar="FILE.html", help="the page  [default: NAME-diagnosis.html]")
@click.option(
    "--model", default="pocket", show_default=True, metavar="NAME|FOLDER", help="pocket, a hub id or a folder"
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="of all randomness")
@click.option("--quick", is_flag=True, help="one view, fewer noise levels, short edits")
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda or cuda:N")
@click.option("--offline", is_flag=True, help="never ask the hub")
@click.help_option("-h", "--help", help="print this and stop")
def diagnose(path: str, prompt: str, **given: Any) -> None:
    """Show what the model makes of SCENE, a splat file, or IMAGE, a picture, on its way to PROMPT.

    Writes one page of figures and tables: drift of the posterior mean, each solver of fixed-point regularisation and
    what it costs, posterior means as pictures, where each guidance pulls, what lambda and N do, and whether an edit can
    be undone. Its path is the last line on stdout. Needs matplotlib: pip install "splatedit[notebook]".
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from splatedit.diagnose import diagnose as start

    click.echo(str(start(path, prompt, **given)))


@cli.command(context_settings={**CONTEXT, "ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[FOLDER] [OPTION OF JUPYTER LAB]...")
@click.option("--port", type=click.IntRange(0, 65535), metavar="N", help="of JupyterLab  [default: 8888, or the next]")
@click.help_option("-h", "--help", help="print this and stop")
def lab(words: tuple[str, ...], port: int | None) -> None:
    """Open JupyterLab on the bundled notebooks, in FOLDER or here.

    Copies notebooks/ and the scenes/ that they read to FOLDER, where they are not there yet; your own versions stay as
    they are. Kernels run this Python, and viewers are reached through JupyterLab itself, from other machines too. Every
    other option goes to `jupyter lab`, as in --no-browser. Needs pip install "splatedit[notebook]".
    """
    from pathlib import Path

    from splatedit.lab import lab as start

    folder, rest = (words[0], words[1:]) if words and not words[0].startswith("-") else (".", words)
    more = [] if port is None else [f"--ServerApp.port={port}"]
    sys.exit(start(Path(folder).expanduser(), [*rest, *more], lambda line: click.echo(line, err=True)))


@cli.command(context_settings=CONTEXT)
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
@click.help_option("-h", "--help", help="print this and stop")
def history(file: str, as_json: bool) -> None:
    """List the edits of FILE, the edited.ply of a run: what they did, which are done, undone, or set aside.

    They lie in FILE.history beside it. A copy of FILE elsewhere keeps its history if that folder is copied along.
    """
    from splatedit import stack

    found = stack.Stack.open(file)
    if as_json:
        import json

        click.echo(json.dumps(stack.as_json(found), indent=1, ensure_ascii=False))
        return
    if found.entries:
        from rich.console import Console

        wide = Console()
        (wide if wide.is_terminal else Console(width=160)).print(stack.table(found))
    else:
        click.echo(f"{file}: no edits are recorded.")
    if found.at is None:
        click.echo(f"{file} was changed by another program since; it can be neither undone nor redone.", err=True)


def moved(file: str, name: str, count: int | None, to: int | None) -> None:
    """What undo and redo have in common: take so many steps or go to an edit, and say where that is."""
    if count is not None and to is not None:
        raise click.UsageError("give N or --to K, not both.", click.get_current_context())
    from splatedit import stack

    found = stack.Stack.open(file)
    if to is None:
        (found.undo if name == "undo" else found.redo)(count or 1)
    elif name == "undo" and found.at is not None and to not in found.numbers(found.at):
        raise InputError(f"{file}: edit {to} is not done, so undo does not lead to it; `splatedit redo --to {to}` may.")
    else:
        found.goto(to)
    place = f"after edit {found.at}, {found.entries[found.at].title}" if found.at else "before the first edit"
    click.echo(f"{file} is as it was {place}", err=True)
    click.echo(file)


@cli.command(context_settings=CONTEXT)
@click.argument("file")
@click.argument("count", type=click.IntRange(1), required=False, metavar="[N]")
@click.option("--to", type=click.IntRange(0), metavar="K", help="back to edit K of the history, 0: before the first")
@click.help_option("-h", "--help", help="print this and stop")
def undo(file: str, count: int | None, to: int | None) -> None:
    """Take back the last edit of FILE, or the last N: it gets the very bytes that it had before.

    The path of FILE is the last line on stdout.
    """
    moved(file, "undo", count, to)


@cli.command(context_settings=CONTEXT)
@click.argument("file")
@click.argument("count", type=click.IntRange(1), required=False, metavar="[N]")
@click.option("--to", type=click.IntRange(0), metavar="K", help="forward to edit K of the history, on any branch")
@click.help_option("-h", "--help", help="print this and stop")
def redo(file: str, count: int | None, to: int | None) -> None:
    """Bring back the edit of FILE that was undone last, or N of them, bit for bit.

    The path of FILE is the last line on stdout.
    """
    moved(file, "redo", count, to)


@cli.command(context_settings=CONTEXT)
@click.argument("file")
@click.argument("strength", type=click.FloatRange(0, 1))
@click.option("--edit", type=click.IntRange(1), metavar="K", help="which edit of the history; else the last one done")
@click.help_option("-h", "--help", help="print this and stop")
def strength(file: str, strength: float, edit: int | None) -> None:
    """Give an edit of FILE part strength: 0 is before it, 1 after it, 0.5 half way; later edits stay on top.

    It can be set again at any time, and undone. The path of FILE is the last line on stdout.
    """
    from splatedit import stack

    entry = stack.Stack.open(file).strength(strength, edit)
    click.echo(f"{file}: {entry.title}" if entry else f"{file}: it has strength {strength:g} already", err=True)
    click.echo(file)


def was_given(name: str) -> bool:
    """Whether an option of the command that runs was said, not left at its default."""
    from click.core import ParameterSource

    return click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT


def read_size(text: str) -> tuple[int, int]:
    """`512` or `640x480` as (width, height) in pixels; raises InputError."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.isdecimal() and 1 <= int(p) <= 8192 for p in parts):
        raise InputError(f"--size: found {text!r}, expected a number of pixels, 512, or width x height, 640x480.")
    return int(parts[0]), int(parts[-1])


def read_colour(text: str) -> tuple[float, float, float]:
    """`1,0.5,0` as red, green, blue in [0, 1]; raises InputError."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--background: found {text!r}, expected three numbers in [0, 1], as in 1,1,1.") from None
    return colour(numbers, "--background")


def main() -> NoReturn:
    """Run the command line; a user's mistake is one line on stderr and exit status 2."""
    try:
        with warnings.catch_warnings():
            for kind in PLAIN:
                warnings.simplefilter("always", kind)
            warnings.showwarning = show_warning
            cli.main(prog_name="splatedit", standalone_mode=False)
    except InputError as error:
        crash = isinstance(error, OutOfMemory) or getattr(error.__cause__, "errno", None) in DISK
        fail(str(error), CRASH if crash else MISTAKE)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(MISTAKE)
    except click.UsageError as error:
        where = f"{error.ctx.command_path} --help" if error.ctx else "splatedit --help"
        fail(f"{error.format_message()} (`{where}` tells more.)", MISTAKE)
    except click.ClickException as error:
        fail(error.format_message(), MISTAKE)
    except (KeyboardInterrupt, click.Abort):
        fail("interrupted before the first step; nothing was written.", INTERRUPTED)
    except OSError as error:
        if error.errno is None:
            raise
        fail(f"{error.filename or 'a file'}: {error.strerror}", CRASH)
    sys.exit(0)


def show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *more: Any) -> None:
    """One line on stderr: for warnings of our own what they say, for any other where it came from, too."""
    where = "" if issubclass(category, PLAIN) else f"{filename}:{lineno}: {category.__name__}: "
    click.echo(f"splatedit: warning: {where}{' '.join(str(message).split())}", err=True)


def fail(message: str, status: int) -> NoReturn:
    click.echo(f"splatedit: error: {' '.join(message.split())}", err=True)
    sys.exit(status)
