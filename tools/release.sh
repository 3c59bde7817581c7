#!/usr/bin/env bash
# Builds the sdist and the wheel of the last commit into dist/ and checks them: `make release`. Tags and uploads nothing.
# Each is installed into an empty environment without its dependencies, which come from the environment of the python on
# the PATH, with the versions in constraints.txt.
set -euo pipefail
cd "$(dirname "$0")/.."

die() {
    echo "release: $1" >&2
    exit 1
}

version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' atlantis_ds/__init__.py)
[ -z "$(git status --porcelain)" ] || die "the working tree has changes (git status): commit or remove them"
grep -qF "## [$version] - " CHANGELOG.md || die "CHANGELOG.md: no section \"## [$version] - DATE\": write it"
grep -qx "version: $version" CITATION.cff || die "CITATION.cff: its version is not $version: change it"
tagged=$(git rev-parse -q --verify "refs/tags/v$version^{commit}" || true)
[ "${tagged:-$(git rev-parse HEAD)}" = "$(git rev-parse HEAD)" ] ||
    die "the tag v$version is on another commit: raise __version__ in atlantis_ds/__init__.py"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH
mkdir "$scratch/tree" "$scratch/dist" "$scratch/empty"
git archive HEAD | tar -x -C "$scratch/tree" # files in build/ and uncommitted files must not be included
(cd "$scratch/tree" && python -c "from setuptools.build_meta import build_sdist; build_sdist('$scratch/dist')") \
    >"$scratch/log" 2>&1 || { cat "$scratch/log" >&2 && die "the sdist cannot be built"; }
# The wheel is built from the sdist, which shows that the sdist is complete.
pip wheel -q --no-deps --no-build-isolation -w "$scratch/dist" "$scratch"/dist/*.tar.gz

dependencies=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
for file in "$scratch"/dist/*; do
    env=$scratch/env-${file##*.}
    python -m venv --without-pip "$env"
    echo "$dependencies" >"$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/rest.pth"
    pip --python "$env/bin/python" install -q --no-deps --no-build-isolation --ignore-installed "$file"
    (
        cd "$scratch/empty"
        "$env/bin/python" -c "import atlantis_ds, sys; sys.exit(not atlantis_ds.__file__.startswith('$env'))" ||
            die "${file##*/}: another atlantis_ds was imported"
        [ "$("$env/bin/atlantis-ds" --version)" = "$version" ] || die "${file##*/}: --version does not say $version"
        "$env/bin/atlantis-ds" check demo.yaml >/dev/null
        pip --python "$env/bin/python" check >/dev/null || die "${file##*/}: dependencies are missing (pip check)"
    )
    echo "release: ${file##*/}: installed; --version, check demo.yaml and pip check are right"
done

rm -rf dist
mv "$scratch/dist" dist
[ -n "$tagged" ] || echo "release: no tag yet: git tag -a v$version -m 'atlantis_ds $version'"
echo "release: atlantis_ds $version is in dist/; nothing was uploaded or pushed"
