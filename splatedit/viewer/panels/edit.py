"""The edit tab: what is asked for, Run, what holds, steps and stops it, how it goes, the command that repeats it.

Every change goes into `app.config` at once. Run calls `jobs.start_run(app.config)`, which is what `splatedit run` does.
"""

from __future__ import annotations

import re
import shlex
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import viser
from viser import uplot

from splatedit.config import (
    GUIDANCES,
    KEYS,
    PRESETS,
    SOLVERS,
    TEXT,
    TIMESTEPS,
    Config,
    as_command,
    check,
    load_config,
    parse_word,
    typed,
    written,
)
from splatedit.errors import InputError
from splatedit.files import made
from splatedit.jobs import Job, start_run
from splatedit.viewer.places import editing, folder_of, unused
from splatedit.viewer.resuming import unfinished

if TYPE_CHECKING:
    from splatedit.viewer.app import App

PERIOD = 0.5  # seconds between two looks at the job
POINTS = 300  # of a curve, at most
MESSAGES = 5  # of the run, the newest
OWN = "as it suits"  # in a list of choices: null
ICONS = {"Pause": viser.Icon.PLAYER_PAUSE, "Resume": viser.Icon.PLAYER_PLAY}
BLUE, ORANGE, GREY = "#1c7ed6", "#f76707", "#868e96"
SMALL = "padding:0 0.9em 0.5em;font-size:0.8em;line-height:1.45;overflow-wrap:anywhere"
CODE = "margin:0;padding:0.5em;border-radius:4px;background:rgba(128,128,128,0.13);white-space:pre-wrap;user-select:all"


# ------------------------------------------------------------------------------------------------------------- settings
class Entry(NamedTuple):
    """One setting of Config as the panel asks for it."""

    key: str
    label: str
    choices: tuple[str, ...] = ()  # () for a line of text, or a tick


MAIN = (
    Entry("guidance", "Guidance", GUIDANCES),
    Entry("guidance_scale", "Scale"),
    Entry("steps", "Steps"),
    Entry("seed", "Seed"),
    Entry("preset", "Preset", tuple(PRESETS)),
)
FPR = (Entry("fpr_iters", "N"), Entry("fpr_lambda", "Lambda"), Entry("solver", "Solver", SOLVERS))
ADVANCED = (
    Entry("model", "Model"),
    Entry("device", "Device"),
    Entry("cameras", "Cameras"),
    Entry("views_per_step", "Views a step"),
    Entry("source_cache", "Source cache"),
    Entry("t_range", "Noise levels"),
    Entry("timesteps", "Drawn", TIMESTEPS),
    Entry("anchor", "Anchor"),
    Entry("outside", "Outside"),
    Entry("grow_percent", "Grow, %"),
    Entry("output_dir", "Outputs"),
)
SUBJECT = (Entry("prompt", "Target"), Entry("source_prompt", "Source"))
SHOWN = {entry.key for entry in (*SUBJECT, *MAIN, *FPR, *ADVANCED)}
# Set by the viewer itself, or by other panels.
ELSEWHERE = {"scene", "viewer", *(key for key in KEYS if key.startswith("mask"))}


def as_text(config: Config, entry: Entry) -> str:
    """The value as the panel shows it: empty, or OWN, for null."""
    value = getattr(config, entry.key)
    if value is None:
        return OWN if entry.choices else ""
    return written(value)


def changed(config: Config, key: str, text: str) -> Config:
    """The settings once the panel's `text` for one of them is taken in; raises InputError if it is not understood.

    A preset brings its settings along.
    """
    text = text.strip() if key not in ("prompt", "source_prompt") else text
    optional = "None" in str(Config.__annotations__[key])
    if optional and text in ("", OWN):
        return replace(config, **{key: None})
    if not text and key not in ("prompt", "source_prompt"):
        raise InputError(f"{key}: it is empty ({KEYS[key]}).")
    if key == "preset":
        return load_config(options={"preset": text}, defaults=config)
    value = text if key in TEXT else typed(key, parse_word(f"{key}={text}")[key])
    new = replace(config, **{key: value})
    check(new)
    return new


def others(config: Config) -> str:
    """The settings that have no field of their own, as far as they are not the defaults, as key=value words."""
    usual = Config()
    keys = [key for key in KEYS if key not in SHOWN | ELSEWHERE and getattr(config, key) != getattr(usual, key)]
    return shlex.join(f"{key}={written(getattr(config, key))}" for key in keys)


def with_others(config: Config, text: str) -> Config:
    """The settings with these key=value words, and the defaults for others without a field; raises InputError."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InputError(f"more settings: {text!r} cannot be read ({error}); write key=value words.") from None
    named = {key for word in words for key in parse_word(word)}
    if known := named & (SHOWN | ELSEWHERE):
        raise InputError(f"more settings: {min(known)!r} has a place of its own in the viewer.")
    usual = {key: getattr(Config(), key) for key in KEYS if key not in SHOWN | ELSEWHERE}
    return load_config(words=words, defaults=replace(config, **usual))


def mask_in_use(config: Config) -> str:
    """Which splats may change, in words."""
    given = [key for key in KEYS if key.startswith("mask") and getattr(config, key) != getattr(Config(), key)]
    if not given:
        return "All splats may change; the Select tab makes masks."
    return "Only these splats may change: " + ", ".join(f"{key}={written(getattr(config, key))}" for key in given)


def source_in_use(scene: Path | None) -> str:
    """What an empty source prompt stands for, in words: as `work.prepare` finds it."""
    from splatedit.files import sidecar
    from splatedit.stack import shows

    if scene is not None:
        try:
            if said := sidecar(scene).source_prompt:
                return f"Empty: {said!r}, its sidecar says."
        except InputError:
            return "Empty: its sidecar would say, but cannot be read."
        if said := shows(scene):
            return f"Empty: {said!r}, its history says."
    return "Empty: the model looks for it."


# -------------------------------------------------------------------------------------------------------------- the job
def commands(config: Config, wrong: Sequence[str], job: Job | None) -> str:
    """What was run and what Run would do next as commands to copy, in HTML; wrong: why the second cannot be said."""
    blocks, last = [], job.config if job is not None else None
    if last is not None:
        blocks.append(("This was run:", shlex.join(as_command(last))))
        if job is not None and job.folder is not None:
            blocks.append(("All its settings:", str(job.folder / "config.yaml")))
    if wrong:
        blocks.append(("Not yet:", "\n".join(wrong)))
    elif last is None or (job is not None and job.ended) or replace(last, scene=config.scene) != config:
        blocks.append(("Run would do:", shlex.join(as_command(config))))
    return "".join(
        f'<div style="{SMALL}">{title}<pre style="{CODE}">{unbroken(text)}</pre></div>' for title, text in blocks
    )


def unbroken(text: str) -> str:
    """Text as HTML of which short words are not broken over lines, as browsers do after a hyphen."""
    words = re.split(r"( )", escape(text))
    return "".join(f'<span style="white-space:nowrap">{w}</span>' if 1 < len(w) < 30 and "-" in w else w for w in words)


class Buttons(NamedTuple):
    """Which buttons make sense, and what the second one says."""

    run: bool
    pause: bool
    step: bool
    stop: bool
    pause_label: str


def buttons(state: str | None, done: int = 0, steps: int = 1) -> Buttons:
    """For the state of a job, None: there is none."""
    writing = state == "running" and done >= steps
    going = state in ("starting", "running") and not writing
    held = state == "paused"
    alive = going or held
    return Buttons(
        run=state in (None, "done", "stopped", "failed"),
        pause=alive,
        step=alive,
        stop=alive,
        pause_label="Resume" if held else "Pause",
    )


def how_far(job: Job) -> str:
    """Steps, seconds per step and time left, in a line."""
    state, held, pace = job.state, job.holds_after, job.pace
    words = {"starting": "loading", "stopping": "stopping, and writing what is done", "running": ""}
    said = words.get(state, state)
    if state in ("starting", "running") and held is not None:
        said = " and ".join(filter(None, (said, f"will hold after step {max(held, job.done)}")))
    elif state == "running" and job.done >= job.steps:
        said = "writing the results"
    parts = [f"step {job.done}/{job.steps}", said]
    if pace is not None:
        parts.append(f"{pace:.2f} s/step")
        if state == "running" and job.done < job.steps:
            parts.append(f"{clock(job.seconds_left or 0.0)} left")
    return " · ".join(part for part in parts if part)


def clock(seconds: float) -> str:
    """85 as 1:25."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def messages(lines: Sequence[str]) -> list[str]:
    """The newest of what a run has said, without its progress and the frames of its boxes."""
    bare = [line.strip("╭╮╰╯─│ ") for line in lines if not line.startswith("step ")]
    return [line for line in bare if line][-MESSAGES:]


def outcome(job: Job) -> str:
    """What came of a job that has ended, in HTML: the verdict, the numbers, what to try, where it lies."""
    if job.outcome is None:
        return f"<b>{job.state}</b>: {escape(str(job.error))}" if job.error is not None else ""
    record = job.outcome.record
    change, steps = record.get("change"), f"{record['steps']} of {record['steps_asked']} steps"
    if change is None:
        told = ["<b>not measured</b>", steps]
    else:
        verdict = {"unchanged": "nothing changed", "noise": "the edit went to noise"}.get(
            change["verdict"], change["verdict"]
        )
        decibels = change["psnr_to_source"]
        told = [
            f"<b>{verdict}</b>",
            steps,
            f"{change['changed_share']:.0%} of the splats changed",
            f"{decibels:.1f} dB to the source" if decibels is not None else "equal to the source",
            f"the model prefers the target in {change['prefers_target']:.0%} of the views",
        ]
    advice = "".join(f"<br>– {escape(hint)}" for hint in (change or {}).get("advice", []))
    return f"{' · '.join(told)}{advice}<br><code>{escape(str(job.outcome.folder))}</code>"


def thinned(columns: Sequence[Sequence[float]], most: int = POINTS) -> tuple[np.ndarray, ...]:
    """Step numbers and columns of numbers, as curves of at most `most` points, each the mean of as many steps.

    Steps of which a number is not finite are left out.
    """
    values = np.array(columns, np.float64).reshape(len(columns), -1)
    table = np.concatenate([np.arange(1, values.shape[1] + 1)[None], values])
    table = table[:, np.isfinite(table).all(0)]
    width = -(-table.shape[1] // most) if table.shape[1] > most else 1
    if width > 1:
        starts = np.arange(0, table.shape[1], width)
        table = np.add.reduceat(table, starts, axis=1) / np.diff([*starts, table.shape[1]])
    return tuple(np.ascontiguousarray(row) for row in table)


# ------------------------------------------------------------------------------------------------------------ the panel
class Panel:
    """The tab: its fields, and a thread that looks at the job a few times a second, which the edit never waits for."""

    def __init__(self, app: App):
        self.app = app
        self.seen = app.config  # the settings that the fields show
        self.wrong: dict[str, str] = {}  # key: what is wrong with what its field says
        self.fields: dict[str, Any] = {}
        self.news = threading.Event()
        self.job: Job | None = None
        self.drawn: Any = None  # what the elements show of the job
        self.asked: Any = None  # what `show_rest` was asked for last
        self.path: Path | None = None  # the scene of the shown command
        self.build()
        threading.Thread(target=self.watch, name="splatedit-edit-panel", daemon=True).start()

    # ------------------------------------------------------------------------------------------------------------ built
    def build(self) -> None:
        gui, act = self.app.server.gui, self.app.act
        for entry in SUBJECT:
            self.add(entry)
        self.source_line = gui.add_html("", visible=False)
        self.run_button = gui.add_button("Run", icon=viser.Icon.PLAYER_PLAY, color="blue", hint="R")
        self.pause_button = gui.add_button("Pause", icon=viser.Icon.PLAYER_PAUSE, hint="Space")
        self.step_button = gui.add_button("Step", icon=viser.Icon.PLAYER_TRACK_NEXT, hint="N: one step, then hold")
        self.stop_button = gui.add_button(
            "Stop", icon=viser.Icon.PLAYER_STOP, color="red", hint="Escape: keep what is done"
        )
        self.go_on_button = gui.add_button("Go on", icon=viser.Icon.PLAYER_SKIP_FORWARD, color="gray", disabled=True)
        self.run_button.on_click(act(self.run))
        self.go_on_button.on_click(act(self.go_on))
        self.pause_button.on_click(act(self.pause))
        self.step_button.on_click(act(self.step))
        self.stop_button.on_click(act(self.stop))
        self.app.hotkey("Edit: run", "R", self.run)
        self.app.hotkey("Edit: pause or go on", "space", self.pause)
        self.app.hotkey("Edit: one step, then hold", "N", self.step)
        self.app.hotkey("Edit: stop and keep what is done", "escape", self.stop)
        self.build_progress()
        for entry in MAIN:
            self.add(entry)
        with gui.add_folder("Fixed-point regularisation (ids)"):
            for entry in FPR:
                self.add(entry)
        with gui.add_folder("Advanced", expand_by_default=False):
            self.mask_line = gui.add_html("")
            for entry in ADVANCED:
                self.add(entry)
            self.more = gui.add_text("More", others(self.app.config), hint="any other settings, as key=value words")
            self.more.on_update(act(self.take_more, newest=True))
        with gui.add_folder("Command", expand_by_default=False):
            self.command_block = gui.add_html("")
        self.show_config()
        self.show_job()
        self.show_rest()

    def build_progress(self) -> None:
        gui = self.app.server.gui
        self.bar = gui.add_progress_bar(0.0, visible=False)
        self.status = gui.add_html("", visible=False)
        self.result = gui.add_html("", visible=False)
        with gui.add_folder("Curves", visible=False) as self.curves:
            self.loss = self.plot("loss (rms of the gradient)", ("loss",))
            self.drift = self.plot("posterior-mean drift", ("before refining", "after"))

    def plot(self, title: str, names: tuple[str, ...]) -> Any:
        """An empty plot over steps, of one line for each name."""
        colors = (BLUE,) if len(names) == 1 else (ORANGE, BLUE)
        lines = (uplot.Series(label=n, stroke=color, width=1.5) for n, color in zip(names, colors, strict=True))
        across, up = (uplot.Axis(stroke=GREY, size=size, font="10px sans-serif") for size in (30, 44))
        return self.app.server.gui.add_uplot(
            tuple(np.zeros(0) for _ in (title, *names)),
            (uplot.Series(label="step"), *lines),
            title=title,
            scales={"x": uplot.Scale(time=False, auto=True)},  # its own default is clock time
            axes=(across, up),
            height=150,
            padding=(10, 12, 0, 0),
            visible=False,
        )

    def add(self, entry: Entry) -> None:
        """The field of one setting."""
        gui, text, hint = self.app.server.gui, as_text(self.app.config, entry), KEYS[entry.key]
        if entry.choices:
            optional = getattr(Config, entry.key) is None
            choices = (OWN, *entry.choices) if optional else entry.choices
            field = gui.add_dropdown(entry.label, choices, initial_value=text, hint=hint)
        else:
            field = gui.add_text(entry.label, text, hint=hint)
        self.fields[entry.key] = field
        field.on_update(self.app.act(lambda _, key=entry.key: self.take(key, str(self.fields[key].value)), newest=True))

    # --------------------------------------------------------------------------------------------------------- settings
    def take(self, key: str, text: str) -> None:
        """A field was changed: take its text over into the settings, or keep in mind what is wrong with it."""
        self.wrong.pop(key, None)
        try:
            self.app.config = changed(self.app.config, key, text)
        except InputError as error:
            self.wrong[key] = str(error)
        if key == "preset":
            self.fill()
        self.show_config()

    def take_more(self, _: Any) -> None:
        self.wrong.pop("more", None)
        try:
            self.app.config = with_others(self.app.config, str(self.more.value))
        except InputError as error:
            self.wrong["more"] = str(error)
        self.show_config()

    def fill(self) -> None:
        """Show in every field what the settings say; those of another panel, of a preset, or of a new scene."""
        for entry in (*SUBJECT, *MAIN, *FPR, *ADVANCED):
            text = as_text(self.app.config, entry)
            if entry.key not in self.wrong and self.fields[entry.key].value != text:
                self.fields[entry.key].value = text
        if "more" not in self.wrong and self.more.value != (text := others(self.app.config)):
            self.more.value = text

    def show_config(self) -> None:
        """The commands, the mask and what is wrong with the fields."""
        self.seen = config = self.app.config
        self.path = self.app.stage.shown.path
        self.mask_line.content = f'<div style="{SMALL}">{escape(mask_in_use(config))}</div>'
        self.command_block.content = commands(
            replace(config, scene=str(self.path or "SCENE")), list(self.wrong.values()), self.app.job
        )

    # ---------------------------------------------------------------------------------------------------------- buttons
    def run(self, event: Any) -> None:
        """Start the edit that the panel asks for, of the scene that is shown."""
        self.app.check_idle()
        if self.wrong:
            raise InputError(" ".join(self.wrong.values()))
        scene = self.app.stage.shown.path or self.save()
        self.app.config = replace(self.app.config, scene=str(scene))
        job = start_run(self.app.config)
        self.app.follow(job)
        self.look()

    def go_on(self, event: Any) -> None:
        """Go on with the run that was stopped or cut off, in its folder."""
        self.app.check_idle()
        if self.wrong:
            raise InputError(" ".join(self.wrong.values()))
        found = unfinished(self.app.config, self.app.job, self.app.stage.shown.path)
        if found.config is None:
            raise InputError(f"{found.words}.")
        self.app.follow(start_run(found.config, resume=found.folder, command=found.command))
        self.look()

    def save(self) -> Path:
        """Save the scene that came from no file, beside where its edits will be; where that is."""
        from splatedit.files import save

        shown = self.app.stage.shown
        path = unused(made(folder_of(shown, self.app.config)) / "scene.ply")
        save(shown.current, path)
        self.app.stage.change(path=path)
        if self.app.config.up is None:
            self.app.config = replace(self.app.config, up=shown.up)
        self.app.notify("Saved", f"The scene came from no file; it is {path} now.", color="blue")
        return path

    def pause(self, event: Any) -> None:
        """Pause, or go on."""
        if job := self.under_way():
            (job.resume if job.state == "paused" else job.pause)()
            self.news.set()

    def step(self, event: Any) -> None:
        if job := self.under_way():
            job.step()
            self.news.set()

    def stop(self, event: Any) -> None:
        if job := self.under_way():
            job.stop()

    def under_way(self) -> Job | None:
        return self.app.job if editing(self.app) else None

    # --------------------------------------------------------------------------------------------- a few times a second
    def watch(self) -> None:
        """Until the viewer is closed: look at the job when there is news of it, at the settings in any case."""
        while not self.app.stage.closed:
            self.news.wait(PERIOD)
            self.news.clear()
            started = time.monotonic()
            self.app.guard(lambda _: self.look(), None)
            time.sleep(max(PERIOD - (time.monotonic() - started), 0.0))

    def look(self) -> None:
        """Bring the elements up to date."""
        if self.app.job is not self.job:
            self.job = self.app.job
            if self.job is not None:
                self.job.listen(lambda _: self.news.set())
        if self.app.config is not self.seen or self.app.stage.shown.path != self.path:
            self.fill()
            self.show_config()
        self.show_job()
        self.show_rest()

    def show_rest(self) -> None:
        """What files say: what an empty Source would mean, whether there is something to go on with."""
        config, job, path = self.app.config, self.app.job, self.app.stage.shown.path
        subject = (path, config.source_prompt, config.prompt, config.steps, config.output_dir)
        seen = (*subject, job, job and job.state, job and job.folder)
        if seen == self.asked:
            return
        self.asked = seen
        self.source_line.visible = config.source_prompt is None
        self.source_line.content = f'<div style="{SMALL}">{escape(source_in_use(path))}</div>'
        found = unfinished(config, job, path)
        self.go_on_button.label, self.go_on_button.disabled = found.words, found.folder is None

    def show_job(self) -> None:
        """State, progress, curves and messages, if there are new ones."""
        job = self.job
        seen = (job, job.state, job.done, job.holds_after, len(job.lines)) if job is not None else (None,)
        if seen == self.drawn:
            return
        first, self.drawn = self.drawn is None or self.drawn[0] is not job, seen
        which = buttons(job and job.state, job.done if job else 0, job.steps if job else 1)
        self.run_button.disabled = not which.run
        self.pause_button.disabled, self.pause_button.label = not which.pause, which.pause_label
        self.pause_button.icon = ICONS[which.pause_label]
        self.step_button.disabled, self.stop_button.disabled = not which.step, not which.stop
        if job is None:
            return
        with self.app.server.atomic():
            self.bar.visible = self.status.visible = True
            self.bar.value, self.bar.animated = 100.0 * job.done / max(job.steps, 1), job.state == "starting"
            told = "<br>".join(unbroken(line) for line in messages(job.lines)) if not job.ended else ""
            self.status.content = f'<div style="{SMALL}"><b>{escape(how_far(job))}</b><br>{told}</div>'
            self.show_curves(job)
            self.result.visible = job.ended
            self.result.content = f'<div style="{SMALL}">{outcome(job)}</div>' if job.ended else ""
        if first or job.ended:
            self.show_config()

    def show_curves(self, job: Job) -> None:
        self.curves.visible = self.loss.visible = job.done > 1
        self.loss.data = thinned([job.curve["loss"]])
        drift = thinned([job.curve["drift_before"], job.curve["drift"]])
        self.drift.visible = job.done > 1 and len(drift[0]) > 1
        self.drift.data = drift


def build(app: App) -> None:
    """Build the tab."""
    Panel(app)
