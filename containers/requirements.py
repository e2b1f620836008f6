"""Print what the installed Megatron-FT needs besides torch and Triton, which NVIDIA's image has.

    python containers/requirements.py >requirements.txt

With the packages of the extras that training and data need.
"""

from importlib.metadata import requires

IN_THE_IMAGE = ("torch", "triton")
EXTRAS = ("dataset", "evaluation", "plots")


def main() -> None:
    """One requirement per line."""
    from packaging.requirements import Requirement

    found = set()
    for line in requires("megatron-ft") or ():
        requirement = Requirement(line)
        marker, requirement.marker = requirement.marker, None
        wanted = marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *EXTRAS))
        if wanted and requirement.name not in IN_THE_IMAGE:
            found.add(str(requirement))
    print(*sorted(found), sep="\n")


if __name__ == "__main__":
    main()
