//! Documents to begin with, and how they are changed.

use super::random::Random;

fn bytes(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

pub fn sidecars() -> Vec<Vec<u8>> {
    bytes(&[
        "id = \"web-01\"\nname = \"Web\"\nstatus = \"ACTIVE\"\nos = \"Linux\"\norigin = \"market\"\nmade_from = \"public\"\n\
         kind = \"full-machine\"\nregion = \"r\"\nencrypted = true\nformat = \"qcow2\"\nallow = [\"base.qcow2\"]\n\
         [tags]\na = \"b\"\n[[disks]]\nfile = \"a.qcow2\"\nformat = \"raw\"\n[[disks]]\nfile = \"b.vhd\"\n",
        "",
        "disks = [{ file = \"../x\" }]\ntags = { \"\\u0000\" = '''x''' }\n",
    ])
}

pub fn policies() -> Vec<Vec<u8>> {
    bytes(&[
        include_str!("../../src/policy/tencent-cvm.toml"),
        include_str!("../../src/policy/zstack.toml"),
        "extends = \"huawei-ims\"\n[[rule]]\nwhen = { key_matches = \"a*\", disk_size_above = \"1T\" }\nrefuse = \"busy\"\n",
    ])
}

pub fn configurations() -> Vec<Vec<u8>> {
    bytes(&[
        "catalog = \"images\"\nformats = [\"raw\", \"vhd\"]\njobs = 4\nrate = \"10M\"\nwait = true\numask = \"022\"\n\
         [bucket]\nb = \"file:///tmp/b\"\n[bucket.c]\nurl = \"s3://c/d\"\nregion = \"r\"\naccess_key_id = \"k\"\n\
         storage_class = \"STANDARD\"\n",
        "catalog = { url = \"s3://images/a\", endpoint = \"http://h:1\" }\npolicy = \"zstack\"\nshared = true\nlease = 30\n",
        "bucket=a=file:///b\\,c,formats=raw:vhd,ro,nosuid,cache=1G,stage_limit=10k,uid=0,x\\\\",
    ])
}

const STATUS: &str = r#"{"version":1,"job_id":"job","status":"FAIL","progress":7,"image":{"id":"i","name":"n","disk":"d",
"format":"vhd","generation":"g","identity":null},"bucket":"b","key":"k","url":"u","size":18446744073709551615,"bytes_done":1,
"bytes_uploaded":0,"begin_time":"2026-01-01T00:00:01Z","end_time":null,"eta_seconds":3,"md5":null,"sha256":"00","etag":"\"e\"",
"client_token":"t","host":"h","attempt":1,"error":{"code":"busy","description":"d","details":"e","cause":"c"}}"#;

pub fn statuses() -> Vec<Vec<u8>> {
    bytes(&[STATUS, &STATUS.replace("\"FAIL\"", "\"RUNNING\"")])
}

pub fn records() -> Vec<Vec<u8>> {
    let record = |source: &str, rest: &str| {
        format!(
            r#"{{"version":1,"request":{{"bucket":"b","key":"a/k.vhd","source":{source},"client_token":null,"tags":{{"a":"b"}},
            "replaces":"nothing"}},"status":{STATUS},"upload_log":"x"{rest}}}"#
        )
    };
    let image = r#"{"image":{"id":"i","name":"n","disk":"d","format":"vhd","generation":"g"}}"#;
    bytes(&[
        &record(r#"{"staged":"/state/staging/x"}"#, ""),
        &record(
            image,
            r#","upload":"u","is_cancelled":true,"stale":[1,99999999999],"publishing":{"size":1,"sha256":"","md5":""}"#,
        ),
        &record(image, r#","status_unwritten":true,"replaces":{"tag":"\"x\""}"#)
            .replace(":1,\"request", ":2,\"request"),
    ])
}

pub fn logs() -> Vec<Vec<u8>> {
    bytes(&[
        "{\"upload\":{\"bucket\":\"b\",\"key\":\"k\",\"id\":\"u\",\"part_size\":8388608}}\n\
             {\"part\":{\"index\":0,\"length\":8,\"id\":\"e\"}}\n{\"part\":{\"index\":9999,\"length\":18446744073709551615,\"id\":\"e\"}}\n\
             {\"stale\":{\"index\":0}}\n{\"digest\":{\"name\":\"sha256\",\"bytes\":8,\"state\":\"00\"}}\n{\"completing\":{\"mark\":\"m\"}}\n\
             {\"placed\":{\"size\":1,\"etag\":null,\"sha256\":\"\",\"md5\":\"\"}}\n",
        "{\"begin\":{\"id\":\"1\",\"bucket\":\"b\",\"from\":{\"key\":\"k\",\"object\":[3,\"t\"],\"sidecars\":{}},\"to\":null}}\n\
         {\"made\":{\"id\":\"1\",\"etag\":null}}\n{\"end\":{\"id\":\"1\"}}\n",
        "{\"bucket\":\"b\",\"key\":\"k\",\"at\":\"2026-11-24T12:00:00Z\",\"known\":[\"u\"],\"initiator\":null}",
    ])
}

pub fn bucket_records() -> Vec<Vec<u8>> {
    let beat = format!(r#"{{"number":3,"ended":false,"upload":"log","status":{STATUS}}}"#);
    let attributes = r#"{"version":1,"directory":"d","files":{"a":{"mode":33188,"uid":4294967295,"modified":"2026-01-01T00:00:00Z",
        "xattrs":{"user.a":"00ff"},"etag":"W/\"x\""},"d/":{"mode":511}},"pending":{"a":{"job":"j","gid":7}}}"#;
    bytes(&[r#"{"host":"h","job_id":"j","image":null}"#, &beat, attributes])
}

pub fn lengths() -> Vec<Vec<u8>> {
    let index = |count: u64| {
        let mut bytes = b"freightfs lengths 1\n".to_vec();
        bytes.extend(3u64.to_le_bytes());
        bytes.extend(b"key");
        bytes.extend(count.to_le_bytes());
        bytes.extend((0..count as u32).flat_map(u32::to_le_bytes));
        bytes
    };
    // The first byte is taken for the number of lengths.
    let piece = |start: u64| [&start.to_le_bytes()[..], &6u64.to_le_bytes(), &[7; 24]].concat();
    vec![index(u64::from(b'f')), index(1), [piece(0), piece(6), piece(3), piece(99)].concat()]
}

pub fn answers() -> Vec<Vec<u8>> {
    bytes(&[
        "<ListBucketResult><Contents><Key>a//b</Key><Size>1</Size></Contents><Contents><Key>a&amp;&#x1;&#66;b</Key></Contents>\
         <CommonPrefixes><Prefix>x/</Prefix></CommonPrefixes><Blob><Name>/a</Name></Blob></ListBucketResult>",
        "404 Not Found: <Error><Code>NoSuchKey</Code><Message>m\nRequestId:1</Message></Error>",
        "400 Bad Request: <Code>BadDigest</Code>",
    ])
}

pub fn names() -> Vec<Vec<u8>> {
    bytes(&[
        "a/b c~#%/ü.fixed.vhd",
        "x.vhd.sha256",
        ".freightfs/x",
        "64K",
        "a/../b",
        "zlib.qcow2",
        "18446744073709551615T",
    ])
}

/// Words that documents have.
const WORDS: [&str; 24] = [
    "\"",
    "{",
    "}",
    "[",
    "]",
    "\\",
    "\n",
    "\0",
    "=",
    ",",
    "'''",
    "null",
    "true",
    "-1",
    "0",
    "18446744073709551615",
    "9007199254740993",
    "1e999",
    "\u{fffd}",
    "..",
    "/",
    "\u{202e}",
    "\\u0000",
    "<",
];

/// Changes a text as its writer may have: words that are doubled, moved, taken from elsewhere or cut off, and other numbers.
pub fn mutate(text: &mut Vec<u8>, random: &mut Random) {
    let length = text.len() as u64;
    let at = random.below(length + 1) as usize;
    let piece = |text: &[u8], random: &mut Random| {
        let from = random.below(length + 1) as usize;
        let most = [4, 30, 300][random.below(3) as usize];
        let to = text.len().min(from + random.below(most) as usize);
        from..to
    };
    match random.below(9) {
        0 => text.truncate(at),
        1 | 2 => {
            let word = WORDS[random.below(WORDS.len() as u64) as usize];
            text.splice(at..at, word.bytes());
        }
        3 => {
            let doubled = text[piece(text, random)].to_vec();
            text.splice(at..at, doubled);
        }
        4 => {
            let range = piece(text, random);
            text.drain(range);
        }
        5 => {
            let taken = text[piece(text, random)].to_vec();
            let range = piece(text, random);
            text.splice(range, taken);
        }
        6 => replace_number(text, at, random),
        7 if length > 0 => text[at.min(length as usize - 1)] = random.next() as u8,
        8 if length > 0 => text[at.min(length as usize - 1)] ^= 1 << random.below(8),
        _ => {}
    }
}

/// Puts another number in the place of the next one.
fn replace_number(text: &mut Vec<u8>, at: usize, random: &mut Random) {
    let Some(from) = text[at..].iter().position(u8::is_ascii_digit).map(|from| at + from) else { return };
    let to = text[from..].iter().position(|b| !b.is_ascii_digit()).map_or(text.len(), |length| from + length);
    let number =
        [0, 1, u64::MAX, 1 << 63, i64::MAX as u64, u64::from(u32::MAX), 1 << random.below(64), random.next()];
    let number = number[random.below(8) as usize].to_string();
    text.splice(from..to, number.bytes());
}
