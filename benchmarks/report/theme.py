"""Colours and styles shared by pages and single pictures; they follow the reader's light or dark setting."""

from __future__ import annotations

# Okabe and Ito's palette for all kinds of colour vision, lighter on a dark background.
LIGHT = ("#6b6b6b", "#0072b2", "#d55e00", "#009e73", "#b3558c", "#b07d00", "#3a93c4", "#7a5195", "#5b7f00", "#a33b3b")
DARK = ("#a8a8a8", "#5db2ea", "#ff8f4a", "#3fcf9f", "#e29cc4", "#e6b422", "#8fd0f5", "#b795d6", "#a4c94b", "#ef8a8a")


def variables(palette: tuple[str, ...]) -> str:
    return ";".join(f"--c{i}:{shade}" for i, shade in enumerate(palette))


COLOURS = f"""
:root{{color-scheme:light dark;--ink:#1d1d1f;--soft:#55555c;--paper:#fff;--line:#d9d9de;--tint:#f3f3f6;
{variables(LIGHT)}}}
@media(prefers-color-scheme:dark){{
:root{{--ink:#ececf0;--soft:#b0b0ba;--paper:#17171a;--line:#3a3a42;--tint:#222228;{variables(DARK)}}}}}
"""
FIGURES = """
svg text{fill:var(--ink)}svg .tick{fill:var(--soft)}svg .grid{stroke:var(--line)}
svg .front{stroke:var(--ink);stroke-dasharray:5 4;stroke-width:1.5}
svg .label{paint-order:stroke;stroke:var(--paper);stroke-width:3px}
"""
