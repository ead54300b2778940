"""Lists that others add to meanwhile, page by page."""

from __future__ import annotations

from typing import Any

from apollo_client.conformance.requirements import require, require_equal
from apollo_client.conformance.server import Server

MAX_PAGES = 1000


def require_newest_first(
    server: Server, request: Any, kind: str, id_field: str, made: list[str]
) -> None:
    """Raises BrokenPromiseError unless pages of two list what was made, each once, newest first.

    Args:
        request: of the list, without a size or a token.
        kind: the field of the answer that has the page.
        id_field: that of each in it which has its id.
        made: ids, in the order in which they were made.
    """
    request.page_size, found = 2, list[str]()
    for _ in range(MAX_PAGES):
        page = server.ask(request)
        ids = [getattr(each, id_field) for each in getattr(page, kind)]
        require(len(ids) <= 2, f"{len(ids)} {kind} in a page of 2")
        found += [each for each in ids if each in made]
        request.page_token = page.next_page_token
        if not page.next_page_token or len(found) >= len(made):
            break
    require_equal(found, made[::-1], f"{kind} in pages of 2")
