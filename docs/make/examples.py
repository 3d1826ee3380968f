"""Examples of docstrings, lines that begin with `>>>`, as code on the page about Python (an extension of griffe).

It writes pages only; a docstring stays as it is.
"""

import re
from typing import Any

from griffe import Extension, Object

_EXAMPLE = re.compile(r"^(>>> .+(?:\n.+)*)", flags=re.MULTILINE)


class Examples(Extension):
    """Fences what an interpreter would show."""

    def on_object(self, *, obj: Object, **more: Any) -> None:
        """Rewrite the docstring of one module, class, function or attribute."""
        if obj.docstring is not None and "```" not in obj.docstring.value:
            obj.docstring.value = _EXAMPLE.sub(r"```python\n\1\n```", obj.docstring.value)
