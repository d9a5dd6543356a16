"""The select tab: a rectangle, a box, a sphere, a rule, the model or a file selects; the selection becomes a mask."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from splatedit.errors import InputError
from splatedit.masks import Box, Mask, Sphere, box, rule, sphere
from splatedit.viewer import pointing, selection
from splatedit.viewer.panels.edit import mask_in_use
from splatedit.viewer.places import editing, folder_of
from splatedit.viewer.selection import COMBINE, NO_MASK
from splatedit.viewer.stage import Shown

if TYPE_CHECKING:
    import viser

    from splatedit.viewer.app import App

TOOLS = {
    "rectangle": "Hold shift and drag a rectangle: what can be seen in it is selected, nothing behind it.",
    "box": "Drag its handles, the small ones change its size, or write numbers; then Select.",
    "sphere": "Place it by a click, drag its handles or write numbers; then Select.",
    "rule": "Compare opacity, scale, red, green, blue, x, y, z or color(r,g,b); join by and, or.",
    "text": "auto asks the model what the edit is about; words of the source prompt, where these are.",
    "file": "A mask, a list of rows or a second splat file.",
}
WIRE = (0, 150, 120)
FAR = ((-1e12, 1e12),) * 3  # a gizmo may go anywhere; viser's own limit is 1000
CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) / 2
EDGES = np.array([(a, b) for a in range(8) for b in range(a) if bin(a ^ b).count("1") == 1])


# --------------------------------------------------------------------------------------------------------------- shapes
def wire_box(size: Sequence[float]) -> np.ndarray:
    """The twelve edges (12, 2, 3) of a box around 0."""
    return (CORNERS * np.array(size))[EDGES].astype(np.float32)


def wire_sphere(radius: float, parts: int = 48) -> np.ndarray:
    """Three great circles (3 parts, 2, 3) around 0."""
    angle = np.linspace(0, 2 * math.pi, parts + 1)
    circle = np.stack([np.cos(angle), np.sin(angle), np.zeros_like(angle)], 1) * radius
    line = np.stack([circle[:-1], circle[1:]], 1)
    return np.concatenate([np.roll(line, turn, axis=2) for turn in range(3)]).astype(np.float32)


def rounded(values: Any, radius: float) -> tuple[float, ...]:
    """Lengths to a thousandth of the scene's radius or finer: nobody sees less, and they are short to write."""
    digits = 3 - math.floor(math.log10(radius))
    return tuple(round(float(v), digits) for v in values)


def first_box(shown: Shown) -> Box:
    """The box that is offered first: the middle of the scene."""
    radius = shown.extent.radius
    return Box(rounded(shown.extent.centre.tolist(), radius), rounded([radius] * 3, radius))


def first_sphere(shown: Shown) -> Sphere:
    """The sphere that is offered first: in the middle of the scene."""
    radius = shown.extent.radius
    return Sphere(rounded(shown.extent.centre.tolist(), radius), rounded([radius / 2], radius)[0])


# ------------------------------------------------------------------------------------------------------------ the panel
class Panel:
    """The elements of the tab; shapes lie in the world of the scene."""

    def __init__(self, app: App):
        self.app = app
        self.lock = threading.Lock()  # two threads select: what takes long, and what does not
        self.past = app.stage.shown
        self.alone: Mask | None = None  # the selection, if it is this one mask
        self.used: dict[str, Any] | None = None  # settings that were made of the selection
        self.used_for: tuple[Path | None, int] | None = None  # of which file, of how many splats
        self.box, self.sphere = first_box(app.stage.shown), first_sphere(app.stage.shown)
        self.waiting = False  # for the click that places the sphere
        self.asked = ("", "")  # words that the model was asked about, and the relevance that it found for them
        self.build()
        self.build_shapes()
        self.refreshing, self.renewing = app.act(self.refresh, newest=True), app.act(self.renew, newest=True)
        self.fitting = app.act(self.fit, newest=True)
        app.server.scene.on_rect_select(modifier="shift")(app.act(self.take_rectangle, slow=True))
        app.stage.listeners.append(self.follow)
        self.choose_tool(None)
        self.refresh(None)

    # ------------------------------------------------------------------------------------------------------------ built
    def build(self) -> None:
        """The elements, top to bottom."""
        gui, act, radius = self.app.server.gui, self.app.act, self.app.stage.shown.extent.radius
        self.tool = gui.add_dropdown("Tool", tuple(TOOLS))
        self.says = gui.add_markdown("")
        self.build_tools()
        self.how = gui.add_dropdown("Combine", tuple(COMBINE), hint="with what is selected already")
        self.select = gui.add_button("Select")
        self.count = gui.add_markdown("")
        self.marked = gui.add_checkbox("Mark it", True, hint="lay the selection over what is shown")
        self.turn = gui.add_button_group("Selection", ("Invert", "Clear"))
        self.reach = gui.add_number("Margin", rounded([0.02 * radius], radius)[0], min=0.0, hint="world units")
        self.margin = gui.add_button_group("By the margin", ("Grow", "Shrink"))
        self.use = gui.add_button("Use as mask", color="teal", hint="only what is selected may change in the next edit")
        self.no_mask = gui.add_button("No mask", hint="all splats may change in the next edit")
        self.mask = gui.add_markdown("")
        self.tool.on_update(act(self.choose_tool))
        self.select.on_click(act(self.press))
        self.marked.on_update(act(lambda _: self.mark(bool(self.marked.value))))
        self.turn.on_click(act(lambda _: self.change(self.turn.value)))
        self.margin.on_click(act(lambda _: self.change(self.margin.value), slow=True))
        self.use.on_click(act(self.use_as_mask))
        self.no_mask.on_click(act(self.use_no_mask))

    def build_tools(self) -> None:
        """What each tool asks for; only those of the chosen one are seen."""
        gui, act = self.app.server.gui, self.app.act
        step = rounded([self.app.stage.shown.extent.radius / 100], self.app.stage.shown.extent.radius)[0]
        fine = {"step": step}
        self.tools = {name: gui.add_folder(name.capitalize(), visible=False) for name in TOOLS if name != "rectangle"}
        with self.tools["box"]:
            self.box_centre = gui.add_vector3("Centre", self.box.centre, **fine)  # type: ignore[arg-type]
            self.box_size = gui.add_vector3("Size", self.box.size, **fine)  # type: ignore[arg-type]
            self.box_text = gui.add_text("As text", "", hint="as --mask-box takes it: cx,cy,cz,sx,sy,sz, and w,x,y,z")
        with self.tools["sphere"]:
            self.place = gui.add_button("Place by a click", hint="the next click on the scene is its centre")
            self.ball_centre = gui.add_vector3("Centre", self.sphere.centre, **fine)  # type: ignore[arg-type]
            self.ball_radius = gui.add_slider("Radius", step, 150 * step, step, self.sphere.radius)
            self.ball_text = gui.add_text("As text", "", hint="as --mask-sphere takes it: x,y,z,r")
        with self.tools["rule"]:
            self.rule = gui.add_text("Rule", "opacity > 0.5")
        with self.tools["text"]:
            self.words = gui.add_text("Words", "auto", hint="auto, or words of the source prompt")
            self.cut = gui.add_text("Above", "", hint="relevance, 1 is the 95th percentile; empty: found")
        with self.tools["file"]:
            self.path = gui.add_text("Path", "")
            self.upload = gui.add_upload_button("Upload", hint="a mask file or a list of rows, from your computer")
        for field in (self.box_centre, self.box_size):
            field.on_update(act(self.box_by_numbers, newest=True))
        for field in (self.ball_centre, self.ball_radius):
            field.on_update(act(self.sphere_by_numbers, newest=True))
        self.box_text.on_update(act(self.box_by_text, newest=True))
        self.ball_text.on_update(act(self.sphere_by_text, newest=True))
        self.place.on_click(act(self.ask_for_click))
        self.upload.on_upload(act(self.take_upload, slow=True))

    def build_shapes(self) -> None:
        """Handles and wires; they lie in the scene and are seen in every browser."""
        scene, act, radius = self.app.server.scene, self.app.act, self.app.stage.shown.extent.radius
        # What lies within the scene is hidden by its splats: arrows that reach out of it can be seen.
        free = {"translation_limits": FAR, "depth_test": False}
        line = {"thickness": 2.0, "thickness_units": "screen"}
        self.frame = scene.add_transform_controls("/select/box", 1.2 * radius, **free)
        self.corner = scene.add_transform_controls(
            "/select/box/size", 0.3 * radius, disable_rotations=True, disable_sliders=True, **free
        )
        self.edges = scene.add_line_segments("/select/box/edges", wire_box(self.box.size), WIRE, **line)
        self.ball = scene.add_transform_controls("/select/sphere", 0.7 * radius, disable_rotations=True, **free)
        self.circles = scene.add_line_segments("/select/sphere/circles", wire_sphere(self.sphere.radius), WIRE, **line)
        self.frame.on_update(act(self.box_by_frame, newest=True))
        self.corner.on_update(act(self.box_by_corner, newest=True))
        self.ball.on_update(act(self.sphere_by_frame, newest=True))
        self.show_box()
        self.show_sphere()

    def fit(self, _: Any) -> None:
        """Another scene: shapes and handles of its size, in its middle."""
        shown = self.app.stage.shown
        radius, self.alone = shown.extent.radius, None
        self.box, self.sphere = first_box(shown), first_sphere(shown)
        self.frame.scale, self.corner.scale, self.ball.scale = 1.2 * radius, 0.3 * radius, 0.7 * radius
        step = rounded([radius / 100], radius)[0]
        self.box_centre.step = self.box_size.step = self.ball_centre.step = step
        self.ball_radius.min, self.ball_radius.max, self.ball_radius.step = step, 150 * step, step
        self.reach.value = rounded([0.02 * radius], radius)[0]
        self.show_box()
        self.show_sphere()

    def choose_tool(self, _: Any) -> None:
        """Show what the tool asks for."""
        chosen = self.tool.value
        self.says.content = TOOLS[chosen]
        for name, folder in self.tools.items():
            folder.visible = name == chosen
        self.select.visible = chosen != "rectangle"
        self.frame.visible, self.ball.visible = chosen == "box", chosen == "sphere" and not self.waiting

    # ----------------------------------------------------------------------------------------------- a box and a sphere
    def show_box(self, dragged: Any = None) -> None:
        """Let all that shows the box show it, but what is being dragged."""
        shape = self.box
        if dragged is not self.frame:
            self.frame.position, self.frame.wxyz = shape.centre, shape.rotation  # type: ignore[assignment]
        if dragged is not self.corner:
            self.corner.position = np.array(shape.size) / 2
        self.edges.points = wire_box(shape.size)
        fill(self.box_centre, tuple(shape.centre))
        fill(self.box_size, tuple(shape.size))
        fill(self.box_text, selection.box_text(shape))

    def show_sphere(self, dragged: Any = None) -> None:
        shape = self.sphere
        if dragged is not self.ball:
            self.ball.position = shape.centre  # type: ignore[assignment]
        self.circles.points = wire_sphere(shape.radius)
        fill(self.ball_centre, tuple(shape.centre))
        self.ball_radius.max = max(150 * self.ball_radius.step, shape.radius)
        fill(self.ball_radius, shape.radius)
        fill(self.ball_text, selection.sphere_text(shape))

    def round(self, values: Any) -> tuple[float, ...]:
        return rounded(values, self.app.stage.shown.extent.radius)

    def box_by_frame(self, _: Any) -> None:
        turn = tuple(round(float(v), 6) for v in self.frame.wxyz)
        self.box = Box(self.round(self.frame.position), self.box.size, turn)
        self.show_box(self.frame)

    def box_by_corner(self, _: Any) -> None:
        """The middle stays: a corner that is drawn out makes the box larger on both sides."""
        least = self.round([1e-3 * self.app.stage.shown.extent.radius])[0]
        size = tuple(max(v, least) for v in self.round(2 * np.abs(self.corner.position)))
        self.box = replace(self.box, size=size)
        self.show_box(self.corner)

    def box_by_numbers(self, event: Any) -> None:
        if event.client is not None:  # else it was set by us
            self.box = replace(self.box, centre=self.box_centre.value, size=self.box_size.value)
            self.show_box()

    def box_by_text(self, event: Any) -> None:
        if event.client is not None:
            self.box = box(self.box_text.value)
            self.show_box()

    def sphere_by_frame(self, _: Any) -> None:
        self.sphere = Sphere(self.round(self.ball.position), self.sphere.radius)
        self.show_sphere(self.ball)

    def sphere_by_numbers(self, event: Any) -> None:
        if event.client is not None:
            self.sphere = Sphere(self.ball_centre.value, self.round([self.ball_radius.value])[0])
            self.show_sphere()

    def sphere_by_text(self, event: Any) -> None:
        if event.client is not None:
            self.sphere = sphere(self.ball_text.value)
            self.show_sphere()

    def ask_for_click(self, event: Any) -> None:
        """The next click on the scene places the sphere; its handles are away until then, or they would take it."""
        scene = self.app.server.scene
        show, take = self.app.act(self.choose_tool), self.app.act(self.place_sphere, slow=True)

        def once(click: Any) -> None:
            scene.remove_click_callback(once)
            self.waiting = False
            show(click)
            take(click)

        if not self.waiting:
            self.waiting = True
            self.choose_tool(None)
            scene.on_click()(once)
        self.app.notify("Click at the scene", "The sphere goes there.", color="blue", client=event.client)

    def place_sphere(self, event: Any) -> None:
        shown = self.app.stage.shown
        point = pointing.surface(selection.drawn(shown), window(event.client), event.screen_pos)
        self.sphere = Sphere(self.round(point.tolist()), self.sphere.radius)
        self.show_sphere()

    # -------------------------------------------------------------------------------------------------------- selecting
    def press(self, event: Any) -> None:
        """Select by the chosen tool; what takes long goes to the other thread."""
        tool = self.tool.value
        if tool == "box":
            self.take(self.box)
        elif tool == "sphere":
            self.take(self.sphere)
        elif tool == "rule":
            self.take(rule(self.rule.value))
        elif tool == "text":
            self.app.check_idle()
            self.app.act(self.take_text, slow=True)(event)
        elif tool == "file":
            self.app.act(lambda _: self.take_file(Path(self.path.value).expanduser()), slow=True)(event)

    def take(self, mask: Mask) -> None:
        """Select what a mask holds of what is on the screen."""
        self.put(selection.masked(self.app.stage.shown, mask), mask)

    def put(self, new: Tensor, alone: Mask | None = None) -> None:
        """Combine rows of the source with what is selected."""
        with self.lock:
            shown, how = self.app.stage.shown, self.how.value
            if len(new) != shown.source.n:
                raise InputError("select: another scene is shown by now; select again.")
            self.alone = alone if how == "replace" or shown.selection is None and how == "add" else None
            self.app.stage.change(selection=selection.combined(shown, new, how), marked=True)

    def take_rectangle(self, event: Any) -> None:
        """What can be seen in the rectangle, by the camera of the browser that drew it."""
        shown = self.app.stage.shown
        part = pointing.rectangle(event.screen_min, event.screen_max)
        chosen = pointing.within(selection.drawn(shown), window(event.client), part)
        self.put(selection.of_source(shown, chosen))

    def take_text(self, event: Any) -> None:
        """Ask the model; a note turns meanwhile. The relevance that was found for other words does not count."""
        words, cut = self.words.value, self.cut.value.strip()
        if words != self.asked[0] and cut == self.asked[1]:
            cut = ""
        try:
            above = float(cut) if cut else None
        except ValueError:
            raise InputError(f"above: found {cut!r}, expected a number, or nothing.") from None
        shown, client = self.app.stage.shown, event.client
        note = None
        if client is not None:
            note = client.add_notification("Asking the model", f"where: {words}", loading=True, with_close_button=False)
        try:
            found = selection.relevant(shown, self.app.config, words, above)
        finally:
            if note is not None:
                note.remove()
        self.cut.value = f"{found.threshold:.3g}"
        if above is None:
            self.asked = (words, self.cut.value)
        self.put(selection.of_source(shown._replace(look="after"), found(shown.current)))

    def take_file(self, path: Path) -> None:
        from splatedit import mask_files

        if not path.name:
            raise InputError("file: say which, or upload one.")
        self.take(mask_files.load(path))

    def take_upload(self, event: Any) -> None:
        """A file from the computer of the one who looks on."""
        given = event.target.value
        with TemporaryDirectory() as folder:
            path = Path(folder) / Path(given.name).name
            path.write_bytes(given.content)
            try:
                self.take_file(path)
            except InputError as error:
                raise InputError(str(error).replace(str(path), path.name)) from None

    def change(self, what: str) -> None:
        """Invert, Clear, Grow or Shrink what is selected."""
        with self.lock:
            shown = self.app.stage.shown
            if what == "Clear":
                chosen = None
            elif what == "Invert":
                old = shown.selection
                chosen = torch.ones(shown.source.n, dtype=torch.bool) if old is None else ~old
            else:
                reach = float(self.reach.value)
                chosen = selection.grown(shown, reach if what == "Grow" else -reach)
            self.alone = None
            self.app.stage.change(selection=chosen, marked=True)

    def mark(self, wanted: bool) -> None:
        if wanted != self.app.stage.shown.marked:
            self.app.stage.change(marked=wanted)

    # --------------------------------------------------------------------------------------------------------- the mask
    def use_as_mask(self, event: Any) -> None:
        """The next edit changes only what is selected; the command in the Edit tab says so too."""
        settings = self.settle()
        shown = self.app.stage.shown
        where = f"written to {settings['mask']}" if settings["mask"] else mask_in_use(self.app.config)
        count = int(selection.current_selection(shown).sum())
        told = f"{count:,} of {shown.source.n:,} splats may change in the next edit; {where}"
        self.app.notify("Mask of the next edit", told, color="green", client=event.client)

    def settle(self) -> dict[str, Any]:
        """Put the mask of the selection into the settings."""
        shown = self.app.stage.shown
        self.used = selection.as_settings(shown, self.alone, folder_of(shown, self.app.config))
        self.used_for = (shown.path, shown.current.n)
        self.app.config = replace(self.app.config, **self.used)
        self.refresh(None)
        return self.used

    def use_no_mask(self, _: Any) -> None:
        """The next edit may change all splats."""
        self.used = None
        self.app.config = replace(self.app.config, **NO_MASK)
        self.refresh(None)

    def renew(self, _: Any) -> None:
        """Another state will be edited next: let the mask that was made of the selection be one of its rows."""
        shown, config = self.app.stage.shown, self.app.config
        if self.used is None or editing(self.app) or self.used_for == (shown.path, shown.current.n):
            return
        if any(getattr(config, name) != value for name, value in self.used.items()) or self.used["mask"] is None:
            return  # set by somebody else, or of any scene
        try:
            self.settle()
        except InputError as error:
            self.use_no_mask(None)
            self.app.notify("The mask is not in use any more", str(error), color="blue")

    # ----------------------------------------------------------------------------------------------- what others change
    def follow(self, shown: Shown, fields: frozenset[str]) -> None:
        """Something else is shown."""
        past, self.past = self.past, shown
        if "source" in fields and past.selection is not None:
            self.app.act(lambda _: self.carry(past, shown))(None)
        if "extent" in fields:
            self.fitting(None)
        if fields & {"source", "selection", "marked"}:
            self.refreshing(None)
        if fields & {"source", "current", "rows", "path"}:
            self.renewing(None)

    def carry(self, past: Shown, now: Shown) -> None:
        """Keep the selection when the newest state becomes the source; an edit that begins is seen without marks."""
        with self.lock:
            chosen, shown = selection.carried(past, now), self.app.stage.shown
            if shown.source is now.source and (chosen is not shown.selection or editing(self.app)):
                self.app.stage.change(selection=chosen, marked=not editing(self.app))

    def refresh(self, _: Any) -> None:
        """Say how many are selected, and which mask is in use."""
        shown = self.app.stage.shown
        self.count.content = selection.counted(shown)
        self.mask.content = mask_in_use(self.app.config)
        if self.marked.value != shown.marked:
            self.marked.value = shown.marked


def window(client: viser.ClientHandle) -> Any:
    """What a browser looks with, as a camera of its window's size."""
    from splatedit.viewer.frame_display import cameras_of, eye_of

    eye = eye_of(client.camera)
    return cameras_of(eye, eye.width, eye.height)


def fill(field: Any, value: Any) -> None:
    """Set an element without asking it back."""
    if field.value != value:
        field.value = value


def build(app: App) -> None:
    """Build the tab."""
    Panel(app)
