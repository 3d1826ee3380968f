"""The page of the server shows what a client writes, and that is answered."""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serve.md"


def test_the_client_of_the_page_is_answered(running, capsys):
    block = next(re.finditer(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S))[1]
    assert "OpenAI(" in block
    exec(block.replace("http://127.0.0.1:8000", running.url).replace("smollm2", "tiny"), {})
    assert capsys.readouterr().out.strip()
