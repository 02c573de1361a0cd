//! What programs and libraries of others say of a file that freightfs made.

use std::path::Path;

use freightfs::format::OutputFormat;

use super::{assert_same, command, freightfs, has, qemu_compare, run, seven_zip, skip, succeed, text};

/// Fails unless qemu-img finds in `image` the disk that `raw` is, and nothing wrong with it.
///
/// What qemu-img cannot read is read by freightfs's own reader, which shares no code with the writer but the
/// headers.
pub fn content(format: OutputFormat, image: &Path, raw: &Path, raw_format: &str) {
    let Some(driver) = format.qemu_name() else {
        let back = image.with_extension("back.raw");
        succeed(freightfs().args(["convert", "--quiet"]).arg(image).arg(&back));
        qemu_compare(raw, raw_format, &back, "raw");
        return std::fs::remove_file(back).unwrap();
    };
    qemu_compare(raw, raw_format, image, driver);
    if ["qcow2", "vhdx", "vdi"].contains(&driver) {
        succeed(command("qemu-img").args(["check", "-f", driver]).arg(image));
    }
}

/// Every independent reader of the format reads it.
pub fn independent_readers(format: OutputFormat, image: &Path, raw: &Path) {
    let virtual_size = raw.metadata().unwrap().len().next_multiple_of(512);
    let unread = [OutputFormat::Raw, OutputFormat::ZstdQcow2, OutputFormat::Zvhd, OutputFormat::Zvhd2];
    if !unread.contains(&format) {
        match seven_zip() {
            Some(program) => drop(succeed(command(program).arg("t").arg(image))),
            None => skip("reading the formats with 7-Zip, which is missing"),
        }
    }
    let libyal = match format {
        OutputFormat::Vhd | OutputFormat::FixedVhd | OutputFormat::Vhdx => Some("vhdiinfo"),
        OutputFormat::Vmdk | OutputFormat::StreamVmdk => Some("vmdkinfo"),
        OutputFormat::Qcow2 | OutputFormat::ZlibQcow2 => Some("qcowinfo"),
        _ => None,
    };
    match libyal {
        Some(program) if has(program) => {
            let said = succeed(command(program).arg(image));
            // VHDX is rounded up to 1 MiB.
            let size = if format == OutputFormat::Vhdx {
                virtual_size.next_multiple_of(1 << 20)
            } else {
                virtual_size
            };
            assert!(said.contains(&format!("{size} bytes")), "{program}: {said}");
        }
        Some(program) => skip(&format!("reading .{} with {program}, which is missing", format.suffix())),
        None => {}
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/independent.py");
    if has_python_readers() {
        succeed(command("python3").arg(script).arg(format.suffix()).arg(image).arg(raw));
    } else {
        skip("reading the formats with dissect.hypervisor and oslo.utils, which are missing");
    }
}

fn has_python_readers() -> bool {
    run(command("python3")
        .args(["-c", "import dissect.hypervisor, oslo_utils, cryptography, backports.zstd"]))
    .status
    .success()
}

/// Two conversions of one source are the same bytes.
pub fn deterministic(source: &Path, image: &Path, more: &[&str]) {
    let again = image.with_file_name(format!("again-{}", image.file_name().unwrap().to_string_lossy()));
    let output = run(freightfs().args(["convert", "--quiet"]).args(more).arg(source).arg(&again));
    assert!(output.status.success(), "{}", text(&output));
    assert_same(image, &again);
    std::fs::remove_file(again).unwrap();
}
