#!/usr/bin/env python3
"""Fetches FlashMLA's and FlashAttention-3's extensions out of the vllm 0.26.0 wheel, without the rest of it.

    python3 fetch_peers.py FOLDER

The package index answers range requests, so only the members below are transferred (about 40 MiB of a wheel of several
hundred). Run it where there is a network and copy FOLDER beside the GPU check; nothing but Python's standard library is needed.
The digest of every member is checked by its CRC-32 in the wheel, the wheel itself by name and version only.
"""

import html
import io
import os
import re
import sys
import urllib.parse
import urllib.request
import zipfile

VERSION = "0.26.0"
MEMBERS = ("vllm/_flashmla_C.abi3.so", "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so")
INDEX = "https://pypi.org/simple/vllm/"


class Remote(io.RawIOBase):
    """A file of which only the parts that are read are transferred."""

    def __init__(self, url):
        self.url, self.at = url, 0
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as answer:
            self.size = int(answer.headers["Content-Length"])

    def seekable(self):
        return True

    def readable(self):
        return True

    def seek(self, offset, whence=0):
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def tell(self):
        return self.at

    def readinto(self, buffer):
        count = min(len(buffer), self.size - self.at)
        if count <= 0:
            return 0
        wanted = {"Range": f"bytes={self.at}-{self.at + count - 1}"}
        with urllib.request.urlopen(urllib.request.Request(self.url, headers=wanted)) as answer:
            if answer.status != 206:
                raise OSError(f"{self.url}: expected an answer to a range request (206), found {answer.status}")
            data = answer.read()
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def wheel():
    """The address of the wheel for Linux x86_64, from the project's page of the index."""
    with urllib.request.urlopen(INDEX) as answer:
        page = answer.read().decode()
    for link in re.findall(r'href="([^"]+)"', page):
        address = urllib.parse.urljoin(INDEX, html.unescape(link)).split("#")[0]
        name = urllib.parse.unquote(address.rsplit("/", 1)[-1])
        if name.startswith(f"vllm-{VERSION}-") and name.endswith("x86_64.whl"):
            return address
    raise SystemExit(f"{INDEX}: expected a wheel vllm-{VERSION}-*-x86_64.whl, found none; see whether the index has another version")


def main():
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    folder = sys.argv[1]
    os.makedirs(folder, exist_ok=True)
    url = wheel()
    with zipfile.ZipFile(io.BufferedReader(Remote(url), 1 << 20)) as archive:
        for name in MEMBERS:
            path = os.path.join(folder, os.path.basename(name))
            with archive.open(name) as source, open(path + ".part", "wb") as target:
                while block := source.read(1 << 20):
                    target.write(block)
            os.replace(path + ".part", path)
            print(f"{path}: {os.path.getsize(path)} bytes")


if __name__ == "__main__":
    main()
