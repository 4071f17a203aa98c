#!/bin/sh
# Fetches the emoji set and lays it out as the data loader reads it: DIR/NAME.webp with its captions, one per line, in
# DIR/NAME.txt. Every 32nd picture is set apart in DIR-held-out, which training does not see.
#
#   examples/train/fetch-emoji.sh build/emoji
#
# Pictures: npm package @lobehub/fluent-emoji-3d 1.1.0, Microsoft's Fluent Emoji, MIT licence.
# Captions: npm package emojibase-data 17.0.0, en/data.json, MIT licence.
# Needs npm, tar and python3.
set -eu
out=${1:?the folder to make}
[ -e "$out" ] && { echo "$out is there already"; exit 0; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for package in @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0; do
    archive=$(cd "$work" && npm pack --silent "$package")
    mkdir -p "$work/$package"
    tar -xzf "$work/$archive" -C "$work/$package"
done
python3 - "$work" "$out" <<'EOF'
import json, pathlib, shutil, sys

work, out = map(pathlib.Path, sys.argv[1:])
pictures = work / "@lobehub/fluent-emoji-3d@1.1.0/package/assets"
entries = json.load(open(work / "emojibase-data@17.0.0/package/en/data.json"))

def name(hexcode):
    """File names and data disagree about the variation selector FE0F."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")

captions = {}
for entry in entries:
    tags = ", ".join(entry.get("tags", []))
    for variant in [entry, *entry.get("skins", [])]:
        lines = [variant["label"]]
        if tags:
            lines += [f"{variant['label']}, {tags}", tags]
        captions[name(variant["hexcode"])] = lines

made = out.with_name(out.name + ".part")
held_out = out.with_name(out.name + "-held-out")
for folder in (made, held_out):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
matched = sorted((p for p in pictures.glob("*.webp") if name(p.stem) in captions), key=lambda p: p.stem)
for i, picture in enumerate(matched):
    folder = held_out if i % 32 == 31 else made
    shutil.copy(picture, folder / picture.name)
    (folder / (picture.stem + ".txt")).write_text("\n".join(captions[name(picture.stem)]) + "\n")
made.rename(out)
print(f"{len(matched)} pictures, {len(list(held_out.glob('*.webp')))} of them held out")
EOF
