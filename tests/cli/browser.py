"""A headless Chromium that is told what to do over a pipe: goes to a page, clicks, types, points and takes pictures."""

import base64
import json
import os
import shutil
import subprocess

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]


def find_browser():
    return next(filter(None, map(shutil.which, BROWSERS)), None)


class Browser:
    """One tab. The protocol is Chromium's own (DevTools), a JSON message ended by NUL in either direction."""

    def __init__(self, folder, width, height):
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        options = [*QUIET, f"--window-size={width},{height}", f"--user-data-dir={folder}", "--remote-debugging-pipe"]
        command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", command, find_browser(), *options, "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.reader, self.writer = os.fdopen(ours_in, "rb"), os.fdopen(ours_out, "wb")
        self.number, self.session, self.said, self.buffer = 0, None, [], b""
        target = next(x for x in self.call("Target.getTargets")["targetInfos"] if x["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.reader.close()
        self.writer.close()

    def _read(self):
        while b"\0" not in self.buffer:
            chunk = os.read(self.reader.fileno(), 65536)
            assert chunk, "the browser has ended"
            self.buffer += chunk
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method, **parameters):
        """The result of a command; what the browser tells meanwhile is kept in ``said``."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        self.writer.write(json.dumps(message).encode() + b"\0")
        self.writer.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.said.append(answer)

    def go(self, address):
        """Opens a page and waits until it is there."""
        self.said.clear()
        self.call("Page.navigate", url=address)
        while not any(x.get("method") == "Page.loadEventFired" for x in self.said):
            self.said.append(self._read())

    def value(self, script):
        """The value of an expression of JavaScript on the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def place(self, selector):
        """The middle of an element, scrolled to."""
        box = self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        return {"x": box[0], "y": box[1]}

    def hover(self, selector):
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **self.place(selector))

    def click(self, selector):
        place = self.place(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def picture(self, path, whole=False):
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    @property
    def complaints(self):
        """What the page has written to the console, and errors."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [x for x in self.said if x.get("method") in kinds]

    @property
    def requests(self):
        """The addresses that the page has asked for, itself and its own data left out."""
        sent = [x["params"]["request"]["url"] for x in self.said if x.get("method") == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("file:", "data:"))]
