"""Links in docs/reference.md, where docstrings write [`KDConfig`] or [`~hf_distill.named.name_of`]."""

import re
from typing import Any


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """The page of the reference with links in the place of such names; mkdocs calls it for each page."""
    if page.file.src_uri != "reference.md":
        return html
    objects = re.findall(r'id="(hf_distill[\w.]*)"', html)
    return re.sub(r"\[<code>~?([\w.]+)</code>\]", lambda name: _link(name[1], objects), html)


def _link(name: str, objects: list[str]) -> str:
    """An object's last name, and a link to it if the page has it."""
    found = [each for each in objects if each == name or each.endswith(f".{name}")]
    shown = f"<code>{name.rpartition('.')[2]}</code>"
    return f'<a href="#{min(found, key=len)}">{shown}</a>' if found else shown
