#!/usr/bin/env bash
# Run a command beside a Ceph object store on 127.0.0.1, of one monitor, one OSD and one gateway, which ends with it:
#   tests/oracles/ceph.sh python -m pytest tests/contract/test_stores.py
# The tests make parts smaller than 5 MiB; so the gateway is told to take them.
set -euo pipefail
folder=$(mktemp -d)
conf=$folder/ceph.conf keys=$folder/keyring port=${CEPH_PORT:-18480} mon=${CEPH_MON_PORT:-16789}
fsid=$(cat /proc/sys/kernel/random/uuid) osd=$(cat /proc/sys/kernel/random/uuid)

end() {
    for name in client.rgw osd.0 mon.a; do
        if [ -e "$folder/run/$name.pid" ]; then kill "$(cat "$folder/run/$name.pid")" || true; fi
    done
    sleep 5
    rm -rf "$folder"
}
trap end EXIT
mkdir "$folder"/{mon,osd,rgw,run}
cat > "$conf" <<CONF
[global]
fsid = $fsid
mon host = v1:127.0.0.1:$mon
public network = 127.0.0.0/8
ms bind ipv6 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = $keys
run dir = $folder/run
admin socket = $folder/run/\$name.asok
pid file = $folder/run/\$name.pid
log file = $folder/run/\$name.log
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data avail crit = 1
mon data avail warn = 2
mon data = $folder/mon
osd data = $folder/osd
osd objectstore = bluestore
bluestore block size = 4294967296
osd memory target = 939524096
rgw frontends = beast endpoint=127.0.0.1:$port
rgw multipart min part size = 1
rgw gc obj min wait = 5
rgw gc processor period = 20
rgw dynamic resharding = false
rgw data = $folder/rgw
CONF
export CEPH_CONF=$conf
{
    ceph-authtool --create-keyring "$keys" --gen-key -n mon. --cap mon 'allow *'
    ceph-authtool "$keys" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
    ceph-authtool "$keys" --gen-key -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *'
    ceph-authtool "$keys" --gen-key -n client.rgw --cap mon 'allow rwx' --cap osd 'allow rwx'
    monmaptool --create --fsid "$fsid" --addv a "[v1:127.0.0.1:$mon]" "$folder/monmap"
    ceph-mon -c "$conf" --mkfs -i a --monmap "$folder/monmap" --keyring "$keys"
    ceph-mon -c "$conf" -i a
    ceph -c "$conf" --connect-timeout 20 osd new "$osd"
    cp "$keys" "$folder/osd/keyring"
    ceph-osd -c "$conf" -i 0 --mkfs --osd-uuid "$osd" --keyring "$keys"
    ceph-osd -c "$conf" -i 0
    radosgw -c "$conf" -n client.rgw --keyring "$keys"
    for _ in $(seq 120); do
        if (exec 3<> "/dev/tcp/127.0.0.1/$port"); then break; fi
        sleep 1
    done
    radosgw-admin -c "$conf" -n client.admin --keyring "$keys" user create --uid=test --display-name=test \
        --access-key=AKIATESTKEY --secret-key=secret-of-the-tests
} > "$folder/log" 2>&1 || { tail -20 "$folder/log" >&2; exit 1; }
WEIGHTOPS_TEST_STORE=http://127.0.0.1:$port "$@"
