#!/usr/bin/env bash
# What:  builds, tests and checksums the image that tasks run in (Apptainer.def); --pin resolves its public base.
# Needs: apptainer 1.2 or newer. --base debootstrap: mmdebstrap and the mirrors of this machine's apt.
#        --pin: skopeo, crane or docker. The whole image: about 25 GB of disk for a while (APPTAINER_TMPDIR says where).
# Again: safe; the image is built under another name and renamed when its test has passed.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: containers/build.sh [--output FILE.sif] [--variant whole|thin] [--lock default|cuda12]
                           [--base oci|debootstrap|FILE.sif] [--detectron2 FOLDER|URL@COMMIT] [--fakeroot] [--fast]
       containers/build.sh --pin
  --output      where the image goes; its checksum goes beside it (default rtshpc.sif)
  --variant     thin: Python and the code, for an environment that is bound over /opt/rtshpc/bound (default whole)
  --lock        which requirements/LOCK.txt, that is which CUDA (default: default)
  --base        oci: the public image that containers/base.lock names by its digest; debootstrap: this machine's own
                distribution, made once and kept beside the image (default oci)
  --detectron2  its source: a folder, or a URL and a full commit
  --fakeroot    for a root without every capability (in a container, in some virtual machines)
  --fast        zstd in place of gzip: a quarter of the time; old kernels cannot read it
  --pin         write the digest that the tag in containers/base.lock has today
TEXT
}

die() {
  echo "error: $*" >&2
  exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
base_lock=${RTSHPC_BASE_LOCK:-$root/containers/base.lock}

locked() { sed -n "s/^$1=//p" "$base_lock"; }

codename() { sed -n 's/^VERSION_CODENAME=//p' /etc/os-release; }

need() { command -v "$1" >/dev/null || die "$1 is not on PATH; $2"; }

pin() { # The digest of the tag, by the first tool that is there.
  local tag digest
  tag=$(locked tag)
  if command -v skopeo >/dev/null; then
    digest=$(skopeo inspect --no-tags --format '{{.Digest}}' "docker://$tag")
  elif command -v crane >/dev/null; then
    digest=$(crane digest "$tag")
  else
    need docker "--pin asks a registry with skopeo, crane or docker"
    digest=$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$tag")
  fi
  [[ $digest =~ ^sha256:[0-9a-f]{64}$ ]] || die "$tag was resolved to \"$digest\", which is no digest"
  sed "s/^digest=.*/digest=$digest/" "$base_lock" >"$base_lock.new"
  mv "$base_lock.new" "$base_lock"
  echo "$tag is $digest"
}

pinned() { # NAME@DIGEST of the public base.
  local tag digest
  tag=$(locked tag) digest=$(locked digest)
  [[ $digest =~ ^sha256:[0-9a-f]{64}$ ]] ||
    die "$base_lock: $tag has no digest; run containers/build.sh --pin, or take --base debootstrap"
  echo "${tag%:*}@$digest"
}

debootstrapped() { # FILE: this machine's own distribution as an image, with all that Apptainer.def would install.
  local suite sources packages=python3,ca-certificates
  [[ $variant == thin ]] || packages+=,python3-venv,python3-gdal
  [[ ! -e $1 ]] || return 0
  need mmdebstrap "install it (apt-get install mmdebstrap), or take --base oci"
  suite=$(codename)
  # shellcheck disable=SC2016 # apt fills these in
  mapfile -t sources < <(apt-get indextargets --format 'deb $(REPO_URI) $(CODENAME) $(COMPONENT)' 'Created-By: Packages' |
    awk -v suite="$suite" '$3 == suite || $3 == suite "-updates" || $3 == suite "-security"')
  [[ ${#sources[@]} -gt 0 ]] || die "apt has no mirror of \"$suite\" (apt-get update?)"
  mmdebstrap --quiet --variant=apt --include="$packages" --dpkgopt=force-unsafe-io \
    --aptopt='Acquire::Check-Valid-Until "false"' "$suite" "$work/base.tar" "${sources[@]}"
  cp "$root/containers/base.def" "$work/base.def"
  (cd "$work" && apptainer --quiet build ${fakeroot:+--fakeroot} "$zstd" part.sif base.def)
  rm "$work/base.tar"
  mv "$work/part.sif" "$1"
}

copy_source() { # FOLDER: the clone's own files as they are now, and which commit that is.
  local parts=(rtshpc configs slurm requirements containers Apptainer.def pyproject.toml README.md LICENSE)
  mkdir "$1"
  if git -C "$root" rev-parse --verify --quiet HEAD >/dev/null; then
    git -C "$root" ls-files -z --cached --others --exclude-standard -- "${parts[@]}" |
      tar -C "$root" --null --files-from=- -cf - | tar -C "$1" -xf -
    git -C "$root" describe --always --abbrev=40 --dirty '--exclude=*' >"$1/COMMIT"
  else
    tar -C "$root" --exclude=__pycache__ -cf - "${parts[@]}" | tar -C "$1" -xf -
  fi
}

copy_detectron2() { # FOLDER SOURCE: the package detectron2 in FOLDER.
  mkdir "$1"
  [[ -n $2 ]] || return 0
  local source=$2
  if [[ ! -d $2 ]]; then
    [[ $2 =~ ^(.+)@([0-9a-f]{40})$ ]] || die "--detectron2 $2: no such folder, nor URL@COMMIT with all 40 digits"
    source=$work/detectron2.git
    git init --quiet "$source"
    git -C "$source" fetch --quiet --depth 1 "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}"
    git -C "$source" checkout --quiet FETCH_HEAD
  fi
  [[ -f $source/detectron2/__init__.py ]] || die "--detectron2 $2: holds no package detectron2"
  # What was compiled there fits that machine's torch; we use the Python part alone.
  tar -C "$source" --exclude='*.so' --exclude=__pycache__ -cf - detectron2 | tar -C "$1" -xf -
}

copy_certificates() { # FILE: whom this machine trusts, for pip behind a network that reads along; or nothing.
  local bundle
  for bundle in "${PIP_CERT:-}" "${SSL_CERT_FILE:-}" /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt; do
    if [[ -n $bundle && -f $bundle ]]; then
      cp "$bundle" "$1"
      return
    fi
  done
  : >"$1"
}

build() {
  local bootstrap=localimage from=base.sif with_detectron2=no part
  [[ -f $root/requirements/$lock.txt ]] || die "--lock $lock: there is no requirements/$lock.txt"
  [[ $variant == whole || $variant == thin ]] || die "--variant $variant is neither whole nor thin"
  [[ $output == *.sif ]] || die "--output $output must end in .sif"
  if [[ $base == oci ]]; then from=$(pinned) bootstrap=docker; fi
  need apptainer "see docs/containers.md"
  output=$(realpath -m "$output")
  mkdir -p "$(dirname "$output")"
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  case $base in
    oci) ;;
    debootstrap)
      base=$(dirname "$output")/base-$(codename)-$variant.sif
      debootstrapped "$base"
      ;;
    *) [[ -f $base ]] || die "--base $base is neither oci nor debootstrap nor an image" ;;
  esac
  [[ $base == oci ]] || ln -s "$(realpath "$base")" "$work/base.sif"
  copy_source "$work/source"
  copy_detectron2 "$work/detectron2" "$detectron2"
  [[ -z $detectron2 ]] || with_detectron2=yes
  copy_certificates "$work/ca.crt"
  part=${output%.sif}.part.sif
  (cd "$work" && apptainer build --force --notest ${fakeroot:+--fakeroot} ${fast:+"$zstd"} --build-arg BOOTSTRAP=$bootstrap --build-arg "BASE=$from" \
    --build-arg "VARIANT=$variant" --build-arg "LOCK=$lock" --build-arg DETECTRON2=$with_detectron2 \
    "$part" source/Apptainer.def)
  apptainer test "$part"
  mv "$part" "$output"
  (cd "$(dirname "$output")" && sha256sum "$(basename "$output")") >"$output.sha256"
  printf '\nimage: %s\nimage_sha256: %s\n' "$output" "$(cut -d' ' -f1 "$output.sha256")"
}

output=rtshpc.sif variant=whole lock=default base=oci detectron2='' fakeroot='' fast=''
zstd='--mksquashfs-args=-comp zstd -Xcompression-level 1'
while [[ $# -gt 0 ]]; do
  case $1 in
    --pin)
      pin
      exit
      ;;
    --help | -h)
      usage
      exit
      ;;
    --fakeroot | --fast)
      declare "${1#--}=yes"
      shift
      ;;
    --output | --variant | --lock | --base | --detectron2)
      [[ $# -gt 1 ]] || die "$1 wants a value"
      declare "${1#--}=$2"
      shift 2
      ;;
    *)
      usage >&2
      die "unknown argument $1"
      ;;
  esac
done
build
