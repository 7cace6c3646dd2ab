"""A stand-in for Google Cloud Storage: the part of its JSON API that gcsfs and tensorstore use, in memory.

`python fake_gcs.py` prints its address and serves until it is ended.
"""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

OBJECT = re.compile(r"(?:/download|/upload)?/storage/v1/b/([^/]+)(?:/o(?:/([^/]*))?)?")


class Object(NamedTuple):
    content: bytes
    generation: int
    updated: str


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    objects: dict[tuple[str, str], Object]  # by bucket and name
    uploads: dict[str, tuple[str, str, bytes]]  # resumable ones: bucket, name, what came so far
    lock: threading.Lock
    clock: list[int]  # the last generation

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def say(self, value: Any, status: int = 200, **headers: str) -> None:
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def refuse(self, status: int, message: str) -> None:
        self.say({"error": {"code": status, "message": message}}, status)

    def about(self, bucket: str, name: str) -> dict[str, Any]:
        found = self.objects[bucket, name]
        link = f"http://{self.headers['Host']}/download/storage/v1/b/{bucket}/o/{quote(name, '')}?alt=media"
        return {
            "kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(found.content)),
            "generation": str(found.generation), "metageneration": "1", "updated": found.updated,
            "timeCreated": found.updated, "mediaLink": link,
        }  # fmt: skip

    def do(self) -> None:
        with self.lock:
            self.handle_request()

    do_GET = do_POST = do_PUT = do_DELETE = do

    def handle_request(self) -> None:
        at = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(at.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        match = OBJECT.fullmatch(at.path)
        if not match:
            return self.refuse(501, f"not in this stand-in: {self.command} {self.path}")
        bucket, name = match[1], unquote(match[2] or "")
        if at.path.startswith("/upload"):
            return self.upload(bucket, query, body)
        if name:
            return self.one(bucket, name, query)
        if "/o" not in at.path[len("/storage/v1/b/") + len(bucket) :]:
            return self.say({"kind": "storage#bucket", "name": bucket, "location": "US"})
        self.listing(bucket, query)

    def unmet(self, bucket: str, name: str, query: dict[str, str]) -> bool:
        """Whether a condition on the object's generation does not hold; then it is answered."""
        found = self.objects.get((bucket, name))
        generation = str(found.generation) if found else "0"
        if query.get("ifGenerationMatch", generation) != generation:
            self.refuse(412, "conditionNotMet")
        elif query.get("ifGenerationNotMatch") == generation:
            self.answer(304)
        else:
            return False
        return True

    def one(self, bucket: str, name: str, query: dict[str, str]) -> None:
        found = self.objects.get((bucket, name))
        if found is None:
            return self.refuse(404, f"No such object: {bucket}/{name}")
        if self.unmet(bucket, name, query):
            return
        if self.command == "DELETE":
            del self.objects[bucket, name]
            return self.answer(204)
        if query.get("alt") != "media":
            return self.say(self.about(bucket, name))
        headers = {"x_goog_generation": str(found.generation), "Content_Type": "application/octet-stream"}
        size = len(found.content)
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            return self.answer(200, found.content, **headers)
        start = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
        end = min(int(wanted[2]), size - 1) if wanted[1] and wanted[2] else size - 1
        if start >= size:
            return self.answer(416, Content_Range=f"bytes */{size}")
        self.answer(206, found.content[start : end + 1], Content_Range=f"bytes {start}-{end}/{size}", **headers)

    def listing(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], set()
        for of, name in sorted(self.objects):
            after, before = query.get("startOffset", ""), query.get("endOffset", "")
            if of != bucket or not name.startswith(prefix) or name < after or (before and name >= before):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest[: rest.index(delimiter) + 1])
            else:
                items.append(self.about(bucket, name))
        self.say({"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        how, name = query.get("uploadType"), query.get("name", "")
        if how == "resumable" and "upload_id" not in query:
            name = name or json.loads(body)["name"]
            number = str(len(self.uploads))
            self.uploads[number] = (bucket, name, b"")
            where = f"http://{self.headers['Host']}{urlsplit(self.path).path}?uploadType=resumable&upload_id={number}"
            return self.answer(200, Location=where)
        if how == "resumable":
            bucket, name, sofar = self.uploads[query["upload_id"]]
            sofar += body
            self.uploads[query["upload_id"]] = (bucket, name, sofar)
            if self.headers["Content-Range"].endswith("/*"):
                return self.answer(308, Range=f"bytes=0-{len(sofar) - 1}")
            body = sofar
        elif how == "multipart":
            mark = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
            assert mark
            parts = body.split(b"--" + mark[1].encode())
            about, body = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in parts[1:3])
            name, body = json.loads(about)["name"], re.sub(rb"\r?\n\Z", b"", body)
        if self.unmet(bucket, name, query):
            return
        self.clock[0] += 1
        updated = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + f".{self.clock[0] % 1000:03d}Z"
        self.objects[bucket, name] = Object(body, self.clock[0], updated)
        self.say(self.about(bucket, name))


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """gcsfs hangs up where it asks in two ways at once and one answer is enough."""


def serve() -> ThreadingHTTPServer:
    """A server with empty buckets, of which every one exists; `server_address` says where."""
    state = {"objects": {}, "uploads": {}, "lock": threading.Lock(), "clock": [1000]}
    server = Server(("127.0.0.1", 0), type("Buckets", (Handler,), state))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def environment(address: str) -> dict[str, str]:
    """What makes gcsfs and tensorstore use it, without credentials and without looking for Google's machines."""
    return {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "abc",  # tensorstore's
        "NO_GCE_CHECK": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which asks by gRPC what kind of bucket it is
    }
