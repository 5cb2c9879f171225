#!/usr/bin/env bash
# What:  Apptainer for tests on a Debian or Ubuntu whose own packages lack it: DIR/bin/apptainer, the system untouched.
# Needs: root, a merged /usr, mmdebstrap (installed if it is not there), the mirror that this machine's apt uses.
# Again: safe; what is there is kept.
# Use:   tests/cluster/apptainer.sh DIR
set -euo pipefail

dir=$(realpath -m "${1:?usage: apptainer.sh DIR}")
[[ ! -x $dir/bin/apptainer ]] || exit 0
command -v mmdebstrap >/dev/null || apt-get install -y -qq --no-install-recommends mmdebstrap >/dev/null
# shellcheck disable=SC2016 # apt fills this in
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' | head -n 1)
programs=apptainer,squashfs-tools,squashfuse,fuse-overlayfs,fuse2fs,fakeroot,uidmap
system=ca-certificates,mount,util-linux,tar,gzip,xz-utils,zstd,dpkg,mawk,sed,grep,coreutils,bash,dash,findutils,perl-base,tzdata,libc-bin
rm -rf "$dir/part"
mkdir -p "$dir/bin"
mmdebstrap --quiet --variant=extract --aptopt='Acquire::Check-Valid-Until "false"' \
  --include="$programs,$system" sid "$dir/part" "$mirror"
ln -sf mawk "$dir/part/usr/bin/awk"
# The starter sees itself in /lib once that /usr lies over the host's, and looks for its state beside it.
ln -sfn /var "$dir/part/usr/lib/var"
ln -sfn /etc "$dir/part/usr/lib/etc"
for ids in subuid subgid; do echo root:100000:65536 >"$dir/part/etc/$ids"; done
cp /etc/ssl/certs/ca-certificates.crt "$dir/part/etc/ssl/certs/" 2>/dev/null || true
rm -rf "$dir/root"
mv "$dir/part" "$dir/root"

{
  printf '#!/bin/sh\n# A private mount namespace with that /usr over the host'"'"'s; every other path is the host'"'"'s own.\n'
  printf 'root=%q\n' "$dir/root"
  cat <<'WRAPPER'
# Root without every capability (a container, some virtual machines) builds and runs in a user namespace.
export APPTAINER_USERNS=1
exec unshare -m --propagation slave sh -c '
  root=$1; shift; cwd=$PWD
  mkdir -p /etc/apptainer /var/lib/apptainer/mnt/session
  mount --bind "$root/etc/apptainer" /etc/apptainer
  for f in subuid subgid; do [ -e /etc/$f ] || : >/etc/$f; mount --bind "$root/etc/$f" /etc/$f; done
  mount --bind "$root/usr" /usr
  [ ! -f /etc/ld.so.cache ] || mount --bind /dev/null /etc/ld.so.cache
  export PATH=/usr/sbin:/usr/bin:/sbin:/bin
  cd "$cwd"; exec /usr/bin/apptainer "$@"' sh "$root" "$@"
WRAPPER
} >"$dir/bin/apptainer.part"
chmod +x "$dir/bin/apptainer.part"
mv "$dir/bin/apptainer.part" "$dir/bin/apptainer"
"$dir/bin/apptainer" --version
