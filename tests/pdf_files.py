"""Small PDF files, written by hand."""

import zlib
from collections.abc import Sequence
from io import BytesIO

FONT = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>"


def pdf_of(*pages: Sequence[str], encrypted: bool = False) -> bytes:
    """Return a PDF file with one page per sequence of lines, in Latin-1."""
    contents = [_stream(_drawn(lines)) for lines in pages]
    data = pdf_of_contents(*contents)
    return _encrypted(data) if encrypted else data


def pdf_of_contents(*contents: bytes) -> bytes:
    """Return a PDF file with one page per content stream."""
    numbers = range(4, 4 + 2 * len(contents), 2)
    kids = b" ".join(b"%d 0 R" % number for number in numbers)
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, len(contents)),
        FONT,
    ]
    for number, content in zip(numbers, contents, strict=True):
        objects += [
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents %d 0 R "
            b"/Resources << /Font << /F 3 0 R >> >> >>" % (number + 1),
            content,
        ]
    return _file(objects)


def unfolding(size: int) -> bytes:
    """Return a PDF file whose page decompresses to `size` bytes of spaces."""
    return pdf_of_contents(_stream(b" " * size))


def _drawn(lines: Sequence[str]) -> bytes:
    """Return the PDF operators that write lines below each other."""
    shown = [
        line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)").encode("latin-1")
        for line in lines
    ]
    return (
        b"BT /F 12 Tf 14 TL 50 780 Td " + b" T* ".join(b"(%s) Tj" % line for line in shown) + b" ET"
    )


def _stream(content: bytes) -> bytes:
    packed = zlib.compress(content, 9)
    head = b"<< /Length %d /Filter /FlateDecode >>" % len(packed)
    return head + b"\nstream\n" + packed + b"\nendstream"


def _file(objects: Sequence[bytes]) -> bytes:
    """Return a PDF file of numbered objects with their cross-reference table."""
    data = b"%PDF-1.7\n"
    places = []
    for number, content in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size = len(objects) + 1
    head = b"xref\n0 %d\n0000000000 65535 f \n" % size
    tail = b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (size, len(data))
    return data + head + table + tail


def _encrypted(data: bytes) -> bytes:
    from pypdf import PdfWriter

    writer = PdfWriter(clone_from=BytesIO(data))
    writer.encrypt("", "owner", algorithm="RC4-128")
    file = BytesIO()
    writer.write(file)
    return file.getvalue()
