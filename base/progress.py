"""Numbers as people read them on a terminal."""

import math

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def short(value: float) -> str:
    """Three digits and an SI prefix: 53.2k, 1.40M."""
    power = 0
    while abs(value) >= 999.5 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return f"{value:#.3g}".rstrip(".") + _PREFIXES[power] if power else f"{value:g}"


def memory(size: float) -> str:
    """Bytes in binary units: 1.5 GiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.3g} {units[0]}"


def duration(seconds: float) -> str:
    """41 s, 3 min 20 s, 2 h 5 min, 4 d 3 h."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"
