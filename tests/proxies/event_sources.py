"""Some `EventSource`s in a browser's page."""

from tests.support.browsers import Browser


class EventSources:
    def __init__(self, browser: Browser, page: str, path: str, count: int) -> None:
        """Open a page, and in it the sources, of a path on the same server."""
        self.browser = browser
        browser.open(page)
        browser.run(
            """
            window.readers = Array.from({ length: arguments[1] }, () => {
              const reader = { ids: [], errors: 0, source: new EventSource(arguments[0]) };
              reader.source.onmessage = ({ lastEventId }) => reader.ids.push(Number(lastEventId));
              reader.source.onerror = () => (reader.errors += 1);
              return reader;
            });
            """,
            path,
            count,
        )

    def ids(self) -> list[list[int]]:
        """The event ids that each reader has had."""
        return list(self.browser.run("return readers.map(({ ids }) => ids)"))

    def errors(self) -> list[int]:
        """How often each reader lost its stream, or tried in vain to get it back."""
        return list(self.browser.run("return readers.map(({ errors }) => errors)"))

    def states(self) -> str:
        """A digit for each reader: 0 connecting, 1 open, 2 closed (by a 204, or it gave up)."""
        script = "return readers.map(({ source }) => source.readyState).join('')"
        return str(self.browser.run(script))

    def close(self) -> None:
        self.browser.run("readers.forEach(({ source }) => source.close())")
