"""Two pictures over one another with a handle between them, for pages and notebooks; without its script, a pair."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

# The page's colours where there are any (see page.STYLE), else some of its own: a notebook has others.
STYLE = """
.pair { position: relative; display: grid; grid-template-columns: 1fr 1fr; border: 1px solid var(--rule, #b4bcc6);
  border-radius: .4rem; overflow: hidden }
.pair img { width: 100%; max-width: 100%; height: auto; display: block; margin: 0; user-select: none;
  -webkit-user-drag: none } .pair input { display: none }
.pair span { position: absolute; top: .4rem; padding: 0 .45rem; border-radius: 1rem; font-size: .75rem; color: #fff;
  background: rgb(0 0 0 / .72); pointer-events: none } .pair span:first-of-type { left: .4rem }
.pair span:last-of-type { right: .4rem }
@media screen {
  .pair.live { grid-template-columns: 1fr; cursor: ew-resize; touch-action: pan-y }
  .pair.live:focus-within { outline: 3px solid var(--link, #0b57b0); outline-offset: 2px }
  .pair.live img { grid-area: 1 / 1 } .pair.live img + img { clip-path: inset(0 0 0 var(--x)) }
  .pair.live::after { content: ""; position: absolute; inset: 0 auto 0 var(--x); width: 2px; margin-left: -1px;
    background: #fff; box-shadow: 0 0 0 1px rgb(0 0 0 / .55) }
  .pair.live input { display: block; position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0;
    pointer-events: none } }
@media print { .pair span { background: #000; print-color-adjust: exact } }
"""
# In a notebook it runs once for every cell: a pair that lives already is left alone.
SCRIPT = """
for (const pair of document.querySelectorAll(".pair:not(.live)")) {
  const range = pair.querySelector("input");
  const show = () => {
    pair.style.setProperty("--x", range.value + "%");
    range.setAttribute("aria-valuetext", range.value + " % before, " + (100 - range.value) + " % after");
  };
  const drag = event => {
    const box = pair.getBoundingClientRect();
    range.value = Math.round(100 * (event.clientX - box.left) / box.width);
    show();
  };
  range.addEventListener("input", show);
  pair.addEventListener("pointerdown", event => {
    if (event.button) return;
    pair.setPointerCapture(event.pointerId);
    range.focus({preventScroll: true});
    if (event.pointerType === "mouse") event.preventDefault();
    drag(event);
  });
  pair.addEventListener("pointermove", event => { if (pair.hasPointerCapture(event.pointerId)) drag(event); });
  pair.classList.add("live");
  show();
}
"""


def pair(
    pictures: Sequence[str],
    size: tuple[int, int],
    *,
    alt: Sequence[str],
    label: str,
    words: Sequence[str] = ("before", "after"),
) -> str:
    """The HTML of one pair: addresses of two pictures of one size (width, height), and what each shows, as text.

    label: what the handle does; words: shown at the corners. The page needs STYLE and SCRIPT once.
    """
    width, height = size
    images = "".join(
        f'<img src="{picture}" width="{width}" height="{height}" alt="{escape(said)}">'
        for picture, said in zip(pictures, alt, strict=True)
    )
    corners = "".join(f'<span aria-hidden="true">{escape(word)}</span>' for word in words)
    # The attribute keeps JupyterLab from taking the arrow keys for its own.
    handle = f'<input type="range" value="50" aria-label="{escape(label)}" data-lm-suppress-shortcuts="true">'
    return f'<div class="pair">{images}{corners}{handle}</div>'
