"""License identifiers, recognized by the wording of a license file."""

import re

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
}
UNKNOWN = "unknown"


def license_of(text: str) -> str:
    """Identifier of the license whose text this is; "unknown" if no pattern matches.

    >>> license_of("Apache License\\n  Version 2.0, January 2004"), license_of("Public domain")
    ('apache-2.0', 'unknown')
    """
    return next((name for wording, name in LICENSES.items() if re.search(wording, text, re.DOTALL)), UNKNOWN)
