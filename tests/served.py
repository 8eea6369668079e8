"""A web server for tests, which behaves like the Hugging Face hub or like one that fails."""

import hashlib
import http.server
import threading


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` ({path: content}) on this machine, as the hub does; asked: what was asked for.

    fault: "mute" (no answer), "drop" (the connection), "stalled" (HEAD is answered, GET is not),
    "cut" (half of a file, and nothing of its rest), "short" (half of a file, as if that were all),
    "portal" (the page of a network that wants a password, whatever is asked for), or a status.
    """

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked, self.closing, self.fault = files, [], threading.Event(), None
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # a client that no longer waits

    def close(self):
        self.closing.set()
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, path = self.server, self.path.partition("?")[0]
        fault, body = server.fault, server.files.get(path)
        server.asked.append(self.path)
        if fault == "mute" or (fault == "stalled" and self.command == "GET"):
            server.closing.wait(120)  # longer than anyone should have waited for it
        if fault == "drop":
            return
        status = fault if isinstance(fault, int) else 404 if body is None else 200
        body = body if status == 200 else b""
        if fault == "portal":
            status, body = 200, b"<html>password?</html>"
        start, size = 0, len(body)
        if range_ := self.headers.get("Range"):
            start, status = int(range_.removeprefix("bytes=").partition("-")[0]), 206
            self.send_response(status)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        else:
            self.send_response(status)
        if fault in ("cut", "short"):
            body = body[: size // 2]
        sent = body[start:]
        told = len(sent) if fault == "short" and self.command == "GET" else size - start
        self.send_header("Content-Length", str(told))
        if fault != "portal":
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            if "/resolve/" in path:
                self.send_header("X-Xet-Hash", "a" * 64)
                self.send_header("Link", f'<{server.url}/xet>; rel="xet-auth"')
            self.send_header("X-Error-Code", "EntryNotFound" if status == 404 else "")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(sent)

    do_HEAD = do_GET
