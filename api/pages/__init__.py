"""The pages for people, which show what the routes answer and offer the same acts."""

from api.pages.routes import install

__all__ = ["install"]
