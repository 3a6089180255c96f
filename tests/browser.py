"""A headless Chromium for tests: opens a page from its file, waits for what it shows, takes pictures of it."""

import base64
import json
import shutil
import subprocess
import time
from pathlib import Path
from urllib.request import urlopen

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FAKE = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")


class Page:
    """A page in a window of its own.

    Args:
        microphone: a recording that its microphone plays over and over; without one there is no microphone.
    """

    def __init__(self, page: Path, profile: Path, microphone: Path | None = None, width: int = 1280):
        import websocket

        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0"]
        options += ["--remote-allow-origins=*", "--autoplay-policy=no-user-gesture-required"]
        options += [f"--user-data-dir={profile}", f"--window-size={width},900"]
        if microphone:
            options += [*FAKE, f"--use-file-for-fake-audio-capture={microphone}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([CHROMIUM, *options, "about:blank"], **quiet)
        port = _eventually(lambda: (profile / "DevToolsActivePort").read_text().split()[0])
        with urlopen(f"http://127.0.0.1:{port}/json") as listed:
            target = next(t for t in json.load(listed) if t["type"] == "page")
        self.socket = websocket.create_connection(target["webSocketDebuggerUrl"], timeout=30)
        self.errors: list[str] = []
        self._number = 0
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **screen)
        self.call("Page.navigate", url=page.as_uri())
        self.until("document.readyState === 'complete'")

    def call(self, method: str, **values) -> dict:
        """What the browser answers; errors of the page, and anything it asks the network for, are kept on the way."""
        self._number += 1
        self.socket.send(json.dumps({"id": self._number, "method": method, "params": values}))
        while (message := json.loads(self.socket.recv())).get("id") != self._number:
            happened, details = message["method"], message["params"]
            if happened == "Runtime.exceptionThrown":
                self.errors.append(details["exceptionDetails"]["exception"].get("description", "an exception"))
            elif happened == "Log.entryAdded" and details["entry"]["level"] == "error":
                self.errors.append(details["entry"]["text"])
            elif happened == "Network.requestWillBeSent" and details["request"]["url"].startswith(("http", "ws")):
                self.errors.append(f"asks for {details['request']['url']}")
        return message.get("result", {})

    def run(self, script: str):
        """The value of an expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script: str, seconds: float = 30.0):
        """The value of an expression as soon as it is something."""
        return _eventually(lambda: self.run(script), seconds)

    def faults(self) -> list[str]:
        """What axe-core finds wrong for those who see, hear or point less well: rule, weight, first element."""
        import axe_core_python

        rules = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text("utf-8")
        asked = "axe.run().then(r => r.violations.map(v => `${v.id} (${v.impact}): ${v.nodes[0].html}`))"
        answer = self.call("Runtime.evaluate", expression=f"{rules};{asked}", awaitPromise=True, returnByValue=True)
        return answer["result"]["value"]

    def picture(self, file: Path, of: str = "body") -> None:
        """A PNG of the first element that fits a selector."""
        box = self.run(f"(b => [b.x, b.y + scrollY, b.width, b.height])"
                       f"(document.querySelector('{of}').getBoundingClientRect())")  # fmt: skip
        clip = dict(zip(("x", "y", "width", "height"), box, strict=True)) | {"scale": 1}
        data = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()
        self.process.kill()
        self.process.wait()


def _eventually(ask, seconds: float = 30.0):
    end = time.monotonic() + seconds
    while True:
        try:
            if found := ask():
                return found
        except (OSError, IndexError):
            pass
        assert time.monotonic() < end, "the browser does not answer, or the page does not show it"
        time.sleep(0.1)
