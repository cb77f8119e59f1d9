"""A page as one file that opens offline: its style and script lie inside, and it may load and run nothing else."""

from __future__ import annotations

import base64
import hashlib
import html


def document(title: str, style: str, script: str, body: str) -> str:
    """The whole HTML. `title` is plain text; `body` is HTML, in which whoever makes it has escaped what others said.

    Pictures and sounds are data URIs. The browser runs this one script alone: markup that slips in does nothing.
    """
    policy = f"default-src 'none'; img-src data:; media-src data:; style-src {_sha(style)}; script-src {_sha(script)}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""


def _sha(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
