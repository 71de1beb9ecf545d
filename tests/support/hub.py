"""A hub that records what it is sent, in place of the network."""

from __future__ import annotations

from types import SimpleNamespace


class Hub:
    """Remembers what it was calls; `broken` makes it fail."""

    broken = ""
    calls: list[dict] = []

    def create_repo(self, repo_id: str, **settings: object) -> SimpleNamespace:
        if self.broken == "create":
            raise RuntimeError("401 who are you\ndetails")
        self.calls.append({"repo_id": repo_id, **settings})
        return SimpleNamespace(repo_id=f"me/{repo_id}" if "/" not in repo_id else repo_id)

    def upload_folder(self, **settings: object) -> str:
        if self.broken == "upload":
            raise ConnectionError("the line is dead")
        self.calls.append(settings)
        return "https://hub/me/mine"
