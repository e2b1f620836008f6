"""License identifiers: recognized by the wording of a license file, and lists of allowed ones."""

import re

from megatron_ft.errors import UserError

# Patterns in the order they are tried: BSD-3-Clause contains all of BSD-2-Clause. Values are the
# identifiers that GitHub's API and CommitPack use.
LICENSES = {
    r"GNU AFFERO GENERAL PUBLIC LICENSE": "agpl-3.0",
    r"GNU LESSER GENERAL PUBLIC LICENSE\s+Version 3": "lgpl-3.0",
    r"GNU LESSER GENERAL PUBLIC LICENSE\s+Version 2\.1": "lgpl-2.1",
    r"GNU GENERAL PUBLIC LICENSE\s+Version 3": "gpl-3.0",
    r"GNU GENERAL PUBLIC LICENSE\s+Version 2": "gpl-2.0",
    r"Mozilla Public License,? [Vv]ersion 2\.0": "mpl-2.0",
    r"Apache License,?\s+Version 2\.0": "apache-2.0",
    r"Neither the name .{1,200}contributors may be used": "bsd-3-clause",
    r"Redistribution and use in source and binary forms": "bsd-2-clause",
    r"Permission is hereby granted, free of charge, to any person obtaining a copy": "mit",
    r"Permission to use, copy, modify, and(?:/or)? distribute this software for any\s+purpose": "isc",
    r"This is free and unencumbered software released into the public domain": "unlicense",
    r"The Artistic License 2\.0": "artistic-2.0",
    r"CC0 1\.0 Universal": "cc0-1.0",
    r"Eclipse Public License -? ?v ?1\.0": "epl-1.0",
}
UNKNOWN = "unknown"
# Licenses that ask for no more than attribution, among those of CommitPack.
PERMISSIVE = frozenset(
    ("apache-2.0", "artistic-2.0", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "isc", "mit", "unlicense")
)
# CommitPack's selection (arXiv 2308.07124); it also has rows whose license is "unknown".
PUBLISHED = PERMISSIVE | {"agpl-3.0", "epl-1.0", "lgpl-2.1", "mpl-2.0"}
LISTS = {"permissive": PERMISSIVE, "published": PUBLISHED}
KNOWN = (
    PUBLISHED
    | frozenset(LICENSES.values())
    | {
        "0bsd",
        "afl-3.0",
        "bsd-4-clause",
        "bsl-1.0",
        "cc-by-4.0",
        "ecl-2.0",
        "epl-2.0",
        "eupl-1.2",
        "gpl-2.0",
        "gpl-3.0",
    }
    | {"lgpl-3.0", "ms-pl", "ncsa", "ofl-1.1", "osl-3.0", "postgresql", "wtfpl", "zlib", UNKNOWN}
)


def license_of(text: str) -> str:
    """Identifier of the license whose text this is; "unknown" if no pattern matches.

    >>> license_of("Apache License\\n  Version 2.0, January 2004"), license_of("Public domain")
    ('apache-2.0', 'unknown')
    """
    return next((name for wording, name in LICENSES.items() if re.search(wording, text, re.DOTALL)), UNKNOWN)


def parse_licenses(text: str, flag: str = "--licenses") -> frozenset[str]:
    """A comma-separated list of identifiers and names of LISTS as the set of identifiers; UserError
    for a name that is neither.

    >>> sorted(parse_licenses("MIT,unknown")), parse_licenses("permissive") == PERMISSIVE
    (['mit', 'unknown'], True)
    """
    allowed: set[str] = set()
    for name in filter(None, (part.strip().lower() for part in text.split(","))):
        if name not in LISTS and name not in KNOWN:
            raise UserError(f"{flag} {name}: not a license; expected {', '.join([*LISTS, *sorted(KNOWN)])}")
        allowed |= LISTS.get(name, {name})
    if not allowed:
        raise UserError(f"{flag} {text!r}: names no license; expected such as permissive or mit,apache-2.0")
    return frozenset(allowed)
