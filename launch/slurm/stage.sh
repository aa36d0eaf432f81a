#!/usr/bin/env bash
# stage.sh SOURCE TARGET: copy a folder of Parquet files (`lars convert` writes one) to this node's own disk, once.
set -euo pipefail
source=$1 target=$2
shopt -s nullglob
files=("$source"/*.parquet)
if [ ${#files[@]} -eq 0 ]; then
    echo "error: $(hostname) finds no Parquet files in STAGE's source $source" >&2
    exit 2
fi
mkdir -p "$target"
exec 9>"$target.lock"
flock 9 # jobs of an array that share a node copy one after the other
for file in "${files[@]}"; do
    copy=$target/$(basename "$file")
    if [ "$(stat --format=%s "$file")" != "$(stat --format=%s "$copy" 2>/dev/null)" ]; then
        cp "$file" "$copy.part" # a copy that is cut off is never taken for the file
        mv "$copy.part" "$copy"
    fi
done
echo "$(hostname): $target has ${#files[@]} files of $source"
