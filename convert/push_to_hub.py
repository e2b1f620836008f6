"""Publish a converted model on the Hugging Face Hub, with a model card of data, recipe and scores.

    python convert/push_to_hub.py runs/first-hf me/my-starcoder --private \\
        --run runs/first --evaluation evaluations/first
    python convert/push_to_hub.py runs/first-hf me/my-starcoder --dry-run

DIR is what convert/megatron_to_hf.py wrote: weights, tokenizer and configurations are uploaded,
nothing else. --run adds the data and the recipe of a training run to the card, --evaluation the
scores of evaluation/run/report.py. The token is that of `hf auth login`, or HF_TOKEN.

One commit publishes everything at the end. A command that was interrupted is repeated: what the Hub
has already is not sent again.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its files would hide others'

from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import EXIT_DONE, run_program
from megatron_ft.printable import printable
from megatron_ft.publishing.hub import Destination, check_repository, files_to_publish, push
from megatron_ft.publishing.model_card import About, model_card, read_report


def main() -> int:
    """Parse the flags, write the card, upload; with --dry-run print what would be uploaded."""
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="Hugging Face directory, or PEFT adapter")
    add("repo", metavar="REPO", help="NAME or OWNER/NAME on the Hub; created if it does not exist")
    add("--private", action="store_true", help="create a repository that only its owners see")
    add("--revision", default="main", metavar="BRANCH", help="branch to commit to; created if it does not exist")
    add("--run", type=Path, metavar="SAVE", help="training run: its data and recipe are put into the card")
    add("--evaluation", type=Path, metavar="DIR", help="evaluation of the model: its report.json is put into the card")
    add("--license", metavar="ID", help="license in the card's metadata, such as bigcode-openrail-m")
    add("--base-model", metavar="NAME", help="model on the Hub that was fine-tuned, such as bigcode/starcoderbase-1b")
    add("--message", default="Upload model", help="message of the commit")
    add("--dry-run", action="store_true", help="print the card and the files, and send nothing")
    args = parser.parse_args()
    check_repository(args.repo)
    files = files_to_publish(args.directory)
    report = read_report(args.evaluation) if args.evaluation else None
    metadata = {"license": args.license, "base_model": args.base_model}
    card = model_card(About(args.directory, args.run, report, metadata))
    if args.dry_run:
        print(printable(card, limit=None, keep="\n"), end="")
        for path in files:
            print(printable(f"{path.name}: {path.stat().st_size / 1e6:,.1f} MB"))
        print(f"nothing was sent; without --dry-run {len(files) + 1} files go to {args.repo}, branch {args.revision}")
        return EXIT_DONE
    address = push(files, card, Destination(args.repo, args.revision, args.private), args.message)
    print(printable(f"published: {address}"))
    return EXIT_DONE


if __name__ == "__main__":
    run_program(main)
