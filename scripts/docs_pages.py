"""What the documentation takes from the package itself: MkDocs calls `on_page_markdown` for every page."""

from typing import Any

from regrow.recipe import explain_fields, load_recipe, shipped_recipes


def recipes() -> str:
    """A table of the shipped recipes."""
    rows = [f"| `{name}` | {load_recipe(name).description} |" for name in shipped_recipes()]
    return "\n".join(["| recipe | what it is |", "|---|---|", *rows])


def settings() -> str:
    """Every key of a recipe, section by section."""
    lines: list[str] = []
    section = ""
    for path, description, default in explain_fields():
        head = path.partition(".")[0] if "." in path else "The recipe itself"
        if head != section:
            section = head
            lines += ["", f"## {section}", "", "| key | default | meaning |", "|---|---|---|"]
        cells = (f"`{path}`", f"`{default!r}`", description)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def recipe(name: str) -> str:
    """A recipe's YAML as it is shipped."""
    return f"```yaml\n{shipped_recipes()[name].strip()}\n```"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put in what `<!-- recipes -->`, `<!-- settings -->` and `<!-- recipe NAME -->` stand for."""
    markdown = markdown.replace("<!-- recipes -->", recipes()).replace("<!-- settings -->", settings())
    for name in shipped_recipes():
        markdown = markdown.replace(f"<!-- recipe {name} -->", recipe(name))
    return markdown
