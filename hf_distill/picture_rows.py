"""Rows with pictures: one form of them, and checks of every row before the training.

A picture becomes pixels and tokens in the workers of the data loader (`picture_batches.py`). So rows have no token ids
before, and what can be known of them without a processor is checked here.
"""

import base64
import binascii
import io
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset, List, Value
from datasets import Image as ImageFeature
from datasets.utils import tqdm
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from trl.data_utils import get_dataset_column_names

from hf_distill.rows import PICTURE, PICTURES, ROLES, is_chat
from hf_distill.token_rows import PEEKED_ROWS

PARTS = ("text", "image")
ROWS_AT_ONCE = 64
# Marks of processors for a picture, which other processors would read as words.
_MARKS = re.compile(r"<\|?(?:image|image_pad|image_soft_token|start_of_image)\|?>")
# Modes of PIL that become RGB without a loss that nobody would expect.
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}

_LONG = reprlib.Repr()
_LONG.maxstring = 300  # of a path in errors

AnyDataset = Dataset | IterableDataset
Row = dict[str, Any]


def has_pictures(dataset: Any) -> bool:
    """True for a data set with a column of pictures, whatever is in it."""
    is_dataset = isinstance(dataset, Dataset | IterableDataset)  # what is none, the trainers say
    return is_dataset and picture_column(columns_of(dataset)) is not None


def has_transform(dataset: Any) -> bool:
    """True for a data set whose rows are made when they are read (`with_transform`)."""
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


def columns_of(dataset: AnyDataset) -> list[str]:
    """The columns of a data set's rows, as they are read: a transform makes its own. Of an empty stream none."""
    is_read = has_transform(dataset) or getattr(dataset, "column_names", None) is None
    return list(next(iter(dataset), {})) if is_read else get_dataset_column_names(dataset)


def picture_column(columns: Sequence[str]) -> str | None:
    """The column of pictures; None without one."""
    return next((name for name in (PICTURES, PICTURE) if name in columns), None)


# ------------------------------------------------------------------------------------------------------------- one form


def with_pictures(dataset: AnyDataset, name: str) -> AnyDataset:
    """A data set whose pictures are `datasets.Image`: of paths, bytes, and base64 text, alone or in lists.

    Raises:
        `ValueError`: two columns of pictures, or one of something else.
    """
    columns = columns_of(dataset)
    if {PICTURES, PICTURE} <= set(columns):
        raise ValueError(f"the {name} dataset has both {PICTURES!r} and {PICTURE!r}: remove one of these columns")
    column = str(picture_column(columns))
    feature: Any = None if has_transform(dataset) else (dataset.features or {}).get(column)
    if feature is None:
        return dataset  # a stream that does not say what it has, or a transform: read as the rows come
    is_list = isinstance(feature, List)
    inner = feature.feature if is_list else feature
    if is_list != (column == PICTURES):
        form = "a list of pictures" if column == PICTURES else "one picture"
        raise ValueError(f"the {name} dataset has {feature} as its {column!r}, which has to be {form} a row")
    if isinstance(inner, ImageFeature):
        return dataset
    wanted = List(ImageFeature()) if is_list else ImageFeature()
    kind = inner.dtype if isinstance(inner, Value) else "bytes" if isinstance(inner, dict) else str(inner)
    if kind == "null":
        return dataset.cast_column(column, wanted)
    if kind in ("string", "large_string"):
        if _is_base64(dataset, column):
            files = {"bytes": Value("binary"), "path": Value("string")}
            features = dataset.features.copy()
            features[column] = List(files) if is_list else files
            dataset = dataset.map(_from_base64, fn_kwargs={"column": column, "name": name}, with_indices=True,
                                  features=features)  # fmt: skip
        return dataset.cast_column(column, wanted)
    is_struct = isinstance(inner, dict) and set(inner) <= {"bytes", "path"}
    if is_struct or kind in ("binary", "large_binary"):
        return dataset.cast_column(column, wanted)
    raise ValueError(
        f"the {name} dataset has {feature} as its {column!r}: a picture is a datasets.Image, a path, bytes, or text in "
        "base64"
    )


def relative_to(dataset: Dataset, folder: str) -> Dataset:
    """Rows with the paths of their pictures below a folder, where they are there and not in the working directory."""
    column = picture_column(dataset.column_names)
    feature: Any = dataset.features.get(column)
    kind = getattr(getattr(feature, "feature", feature), "dtype", None)
    if column is None or kind not in ("string", "large_string") or _is_base64(dataset, column):
        return dataset

    def placed(path: str | None) -> str | None:
        below = None if path is None or os.path.isabs(path) else os.path.join(folder, path)
        return below if below and os.path.isfile(below) and not os.path.isfile(str(path)) else path

    def cells(cell: Any) -> dict[str, Any]:
        return {column: [placed(path) for path in cell] if isinstance(cell, list) else placed(cell)}

    return dataset.map(cells, input_columns=[column], load_from_cache_file=False)  # files come and go


def _is_base64(dataset: AnyDataset, column: str) -> bool:
    """True if the first picture of a column of texts is one itself, and not the path of one."""
    for row in islice(dataset, PEEKED_ROWS):
        cells = row[column] if isinstance(row[column], list) else [row[column]]
        if cells and cells[0]:
            return _decoded(cells[0]) is not None
    return False


def _decoded(text: str) -> bytes | None:
    """The bytes of a text in base64, with or without `data:image/png;base64,`; None for another text."""
    is_data = text.startswith("data:")
    packed = "".join((text.partition(",")[2] if is_data else text).split())  # some write it in lines
    try:
        return base64.b64decode(packed, validate=True) if is_data or len(packed) > 40 else None
    except (binascii.Error, ValueError):
        return None


def as_entry(cell: str | bytes) -> dict[str, Any]:
    """A path, base64 text or bytes as an entry of `datasets.Image`."""
    data = _decoded(cell) if isinstance(cell, str) else cell
    return {"bytes": data, "path": None if data is not None else cell}


def _from_base64(row: Row, index: int, column: str, name: str) -> Row:
    def entry(text: str | None) -> dict[str, Any] | None:
        if text is None:
            return None
        found = as_entry(text)
        if found["bytes"] is None and len(text) > 1000:
            raise ValueError(f"row {index} of the {name} dataset has a picture that is no base64: write it again")
        return found

    cell = row[column]
    return {column: [entry(text) for text in cell] if isinstance(cell, list) else entry(cell)}


# --------------------------------------------------------------------------------------------------------------- checks


def check_picture_rows(dataset: AnyDataset, name: str, used: Sequence[str], text_field: str) -> None:
    """Raises `ValueError` for rows whose pictures and words do not belong together, and for files that are no pictures.

    Of a data set all rows are looked at, and the headers of all files. The pictures of the first 1,000 rows are read
    whole, those of a stream's first rows, too.

    Args:
        used: the columns that are the rows' text.
        text_field (`str`): the one that is plain text.
    """
    length = len(dataset) if isinstance(dataset, Dataset) else None
    rows = tqdm(unread(dataset), desc=f"Looking at the pictures of the {name} dataset", unit=" rows", total=length)
    for index, row in enumerate(rows):
        called = f"row {index} of the {name} dataset"
        pictures = pictures_of(row)
        for place, picture in enumerate(pictures):
            if problem := picture_problem(picture, whole=index < PEEKED_ROWS):
                raise ValueError(f"picture {place} of {called} {problem}")
        check_places(row, len(pictures), used, text_field, called)


def unread(dataset: AnyDataset) -> Iterator[Row]:
    """Rows whose pictures are bytes and paths, of a stream the first ones; no picture is read for it."""
    if not isinstance(dataset, Dataset) or has_transform(dataset):
        yield from islice(iter(dataset), PEEKED_ROWS)
        return
    for table in dataset.with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
        yield from table.to_pylist()  # pyright: ignore[reportAttributeAccessIssue]


def picture_problem(picture: Any, *, whole: bool) -> str | None:
    """The problem with a picture, an entry of `datasets.Image` or a picture of PIL; None if there is none.

    `whole` says whether it is read to its end, and not its header alone.
    """
    if isinstance(picture, Image.Image):
        return _mode_problem(picture)
    if isinstance(picture, str | bytes):
        picture = as_entry(picture)
    if not isinstance(picture, Mapping) or not (picture.get("bytes") or picture.get("path")):
        return f"is no picture, but {type(picture).__name__}: give a datasets.Image, a path, bytes, or text in base64"
    data, path = picture.get("bytes"), str(picture.get("path"))
    if data is None:
        if "://" in path:
            return f"is an address ({_LONG.repr(path)}): download it first, and give its path"
        if not os.path.isfile(path):
            return f"is {_LONG.repr(path)}, and there is no such file; paths are relative to the working directory"
    try:
        with Image.open(io.BytesIO(data) if data is not None else path) as opened:
            if (frames := getattr(opened, "n_frames", 1)) > 1 and opened.format != "MPO":  # phones add a small copy
                return f"has {frames} frames: save the one that is meant as a file of its own"
            if problem := _mode_problem(opened):
                return problem
            if whole:
                _read_whole(opened)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"cannot be read ({' '.join(str(error).split())[:200]}): mend the file, or drop the row"
    return None


def _read_whole(opened: Image.Image) -> None:
    """Reads a file to its end, with as few pixels as its format allows."""
    if opened.format == "PNG":
        opened.verify()  # checksums, and no pixel
    else:
        opened.draft(None, (1, 1))  # an eighth of a JPEG's width and height
        opened.load()


def _mode_problem(picture: Image.Image) -> str | None:
    if picture.mode in MODES:
        return None
    return f"has the mode {picture.mode}, which has no colours of 8 bits: convert it to RGB first"


def check_places(row: Row, number: int, used: Sequence[str], text_field: str, name: str) -> None:
    """Raises `ValueError` where the places of a row, called `name`, are not those of its `number` of pictures."""
    if text_field in used:
        return  # The processor's own token marks the places, and only it can count them.
    sides = [column for column in used if is_chat(row.get(column))]
    if not sides:
        return
    places, has_user_text = 0, False
    for column in sides:
        for message in row[column]:
            role = ROLES.get(message.get("role") or message.get("from"), message.get("role"))
            found = _places(message, role, name)
            if found and (column == "completion" or role == "assistant"):
                raise ValueError(f"{name} has a picture in an answer (role {role!r}): models here answer in text alone")
            if found and role == "tool":
                raise ValueError(f"{name} has a picture in a message of a tool: put it into one of a user")
            has_user_text |= role == "user" and isinstance(content_of(message), str)
            places += found
    if number and not places and has_user_text:
        return  # TRL puts them before the first text of a user.
    if places != number:
        raise ValueError(
            f"{name} has {number} picture{'s' * (number != 1)} and {places} place{'s' * (places != 1)} for them: each "
            'picture needs its part {"type": "image"} in the messages, in order; without any, and with content that is '
            "text, all stand before the first message of a user"
        )


def content_of(message: Mapping[str, Any]) -> Any:
    return message.get("content") if message.get("content") is not None else message.get("value")


def _places(message: Mapping[str, Any], role: Any, name: str) -> int:
    """The places for pictures in a message."""
    if role not in ("system", "user", "assistant", "tool"):
        raise ValueError(f"a message of {name} has the role {role!r}; there are system, user, assistant and tool")
    content = content_of(message)
    if content is None and role == "assistant" and message.get("tool_calls"):
        return 0
    if isinstance(content, str):
        _refuse_marks(content, name)
        return 0
    if not isinstance(content, list | tuple) or not all(isinstance(part, Mapping) for part in content):
        raise ValueError(f"a message of {name} has no content: it has to be text, or a list of parts")
    for part in content:
        kind = part.get("type")
        if kind not in PARTS:
            raise ValueError(
                f"a message of {name} has a part of the type {kind!r}; there are text and image. Pictures stand in the "
                f"column {PICTURES!r}, and {{'type': 'image'}} marks their places"
            )
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise ValueError(f"a message of {name} has a part of the type 'text' without a text")
            _refuse_marks(part["text"], name)
        if kind == "image" and any(part.get(key) is not None for key in ("image", "url", "path", "base64")):
            raise ValueError(
                f"a message of {name} has a picture inside of its part: put it into the column {PICTURES!r}, and leave "
                "{'type': 'image'} in its place"
            )
    return sum(part["type"] == "image" for part in content)


def _refuse_marks(text: str, name: str) -> None:
    if marks := _MARKS.findall(text):
        raise ValueError(
            f'{name} has {marks[0]!r} in its text: write the content in parts, {{"type": "image"}} and {{"type": '
            '"text", "text": ...}, so that each processor can put its own marks there'
        )


# ------------------------------------------------------------------------------------------------------------- pictures


def pictures_of(row: Mapping[str, Any]) -> list[Any]:
    """The pictures of a row; none where its cell is empty."""
    cell = row.get(PICTURES) if PICTURES in row else row.get(PICTURE)
    return [] if cell is None else list(cell) if isinstance(cell, list | tuple) else [cell]


def rgb(picture: Any) -> Any:
    """A picture in RGB, upright, and on white where it is transparent, as those who made it saw it.

    A path, bytes, and base64 text are opened.
    """
    if isinstance(picture, str | bytes):
        picture = as_entry(picture)
    if isinstance(picture, Mapping):
        picture = ImageFeature().decode_example({"bytes": None, "path": None, **picture})
    if not isinstance(picture, Image.Image):
        return picture
    if picture.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode == "RGB":
        return picture
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def small(picture: Any, side: int = 128, num_bytes: int = 6_000) -> str:
    """A picture as an address that holds it ("data:image/png;base64,..."), at most `side` pixels wide and high.

    It is exact where that takes no more than `num_bytes`: a page has hundreds of pictures.
    """
    copy = rgb(picture).copy()
    copy.thumbnail((side, side))
    for form, options in (("png", {"optimize": True}), ("jpeg", {"quality": 75})):
        file = io.BytesIO()
        copy.save(file, form, **options)
        if file.tell() <= num_bytes:
            break
    return f"data:image/{form};base64,{base64.b64encode(file.getvalue()).decode()}"
