//! The names of the formats: what an image file can be, and what a file of the mount can be.

use crate::error::{Error, ErrorKind, Result};

/// The format that an image file has, told by the catalog or by the file's extension, never by its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// The disk's bytes as they are.
    Raw,
    /// QEMU copy-on-write, version 2 or 3.
    Qcow2,
    /// VHD, fixed or dynamic.
    Vhd,
    /// VHDX, fixed or dynamic.
    Vhdx,
    /// VMDK, in one file or several.
    Vmdk,
    /// VDI, dynamic or fixed.
    Vdi,
    /// ZVHD. Either name reads both, which the file's own cookie tells apart.
    Zvhd,
    /// ZVHD2.
    Zvhd2,
}

impl ImageFormat {
    /// The name that qemu-img and catalogs use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vhd => "vhd",
            Self::Vhdx => "vhdx",
            Self::Vmdk => "vmdk",
            Self::Vdi => "vdi",
            Self::Zvhd => "zvhd",
            Self::Zvhd2 => "zvhd2",
        }
    }

    /// The format with that name, as written in a catalog or in an image's own header.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "raw" => Some(Self::Raw),
            "qcow2" => Some(Self::Qcow2),
            // qemu-img calls it by the program that it comes from.
            "vhd" | "vpc" => Some(Self::Vhd),
            "vhdx" => Some(Self::Vhdx),
            "vmdk" => Some(Self::Vmdk),
            "vdi" => Some(Self::Vdi),
            "zvhd" => Some(Self::Zvhd),
            "zvhd2" => Some(Self::Zvhd2),
            _ => None,
        }
    }

    /// The format that a file's name tells by its extension.
    pub fn from_file_name(name: &str) -> Option<Self> {
        match name.rsplit_once('.')?.1.to_ascii_lowercase().as_str() {
            "raw" | "img" => Some(Self::Raw),
            "qcow2" => Some(Self::Qcow2),
            "vhd" => Some(Self::Vhd),
            "vhdx" => Some(Self::Vhdx),
            "vmdk" => Some(Self::Vmdk),
            "vdi" => Some(Self::Vdi),
            "zvhd" => Some(Self::Zvhd),
            "zvhd2" => Some(Self::Zvhd2),
            _ => None,
        }
    }
}

/// A format that the mount and `convert` can produce; its suffix names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum OutputFormat {
    /// `.raw`: the disk's bytes.
    Raw,
    /// `.qcow2`: version 3, uncompressed.
    Qcow2,
    /// `.vhd`: dynamic VHD.
    Vhd,
    /// `.fixed.vhd`: fixed VHD, what Azure imports.
    FixedVhd,
    /// `.vmdk`: monolithicSparse VMDK.
    Vmdk,
    /// `.vhdx`: dynamic VHDX.
    Vhdx,
    /// `.vdi`: dynamic VDI.
    Vdi,
    /// `.zlib.qcow2`: version 3, clusters compressed with zlib.
    ZlibQcow2,
    /// `.zstd.qcow2`: version 3, clusters compressed with zstd.
    ZstdQcow2,
    /// `.stream.vmdk`: streamOptimized VMDK.
    StreamVmdk,
    /// `.zvhd`: what Huawei Cloud and Open Telekom Cloud import and export.
    Zvhd,
    /// `.zvhd2`: the same for fast export and import of large images.
    Zvhd2,
}

impl OutputFormat {
    /// Every format, in the order in which directories list them.
    pub const ALL: [Self; 12] = [
        Self::Raw,
        Self::Qcow2,
        Self::Vhd,
        Self::FixedVhd,
        Self::Vmdk,
        Self::Vhdx,
        Self::Vdi,
        Self::ZlibQcow2,
        Self::ZstdQcow2,
        Self::StreamVmdk,
        Self::Zvhd,
        Self::Zvhd2,
    ];

    /// Whether the file's size is known only after its data has been compressed once.
    pub fn is_compressed(self) -> bool {
        matches!(self, Self::ZlibQcow2 | Self::ZstdQcow2 | Self::StreamVmdk | Self::Zvhd | Self::Zvhd2)
    }

    /// The suffix without its leading dot; also the format's name in options and documents.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vhd => "vhd",
            Self::FixedVhd => "fixed.vhd",
            Self::Vmdk => "vmdk",
            Self::Vhdx => "vhdx",
            Self::Vdi => "vdi",
            Self::ZlibQcow2 => "zlib.qcow2",
            Self::ZstdQcow2 => "zstd.qcow2",
            Self::StreamVmdk => "stream.vmdk",
            Self::Zvhd => "zvhd",
            Self::Zvhd2 => "zvhd2",
        }
    }

    /// The driver name with which qemu-img reads a file of this format, if it has one.
    pub fn qemu_name(self) -> Option<&'static str> {
        Some(match self {
            Self::Raw => "raw",
            Self::Qcow2 | Self::ZlibQcow2 | Self::ZstdQcow2 => "qcow2",
            Self::Vhd | Self::FixedVhd => "vpc",
            Self::Vmdk | Self::StreamVmdk => "vmdk",
            Self::Vhdx => "vhdx",
            Self::Vdi => "vdi",
            Self::Zvhd | Self::Zvhd2 => return None,
        })
    }

    /// The reader of a file of this format.
    pub fn image_format(self) -> ImageFormat {
        match self {
            Self::Raw => ImageFormat::Raw,
            Self::Qcow2 | Self::ZlibQcow2 | Self::ZstdQcow2 => ImageFormat::Qcow2,
            Self::Vhd | Self::FixedVhd => ImageFormat::Vhd,
            Self::Vmdk | Self::StreamVmdk => ImageFormat::Vmdk,
            Self::Vhdx => ImageFormat::Vhdx,
            Self::Vdi => ImageFormat::Vdi,
            Self::Zvhd => ImageFormat::Zvhd,
            Self::Zvhd2 => ImageFormat::Zvhd2,
        }
    }

    /// The plain format that such an image has.
    pub fn of_image(format: ImageFormat) -> Self {
        match format {
            ImageFormat::Raw => Self::Raw,
            ImageFormat::Qcow2 => Self::Qcow2,
            ImageFormat::Vhd => Self::Vhd,
            ImageFormat::Vhdx => Self::Vhdx,
            ImageFormat::Vmdk => Self::Vmdk,
            ImageFormat::Vdi => Self::Vdi,
            ImageFormat::Zvhd => Self::Zvhd,
            ImageFormat::Zvhd2 => Self::Zvhd2,
        }
    }

    /// The format of a disk image that a file's name tells: by its suffix, or as that of an image in a catalog.
    pub fn of_file_name(name: &str) -> Option<Self> {
        let suffix = Self::split_file_name(name).map(|(_, format)| format);
        suffix.or_else(|| ImageFormat::from_file_name(name).map(Self::of_image))
    }

    /// The format whose name this is.
    pub fn from_suffix(suffix: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|f| f.suffix() == suffix).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|f| f.suffix()).collect();
            Error::new(
                ErrorKind::Malformed,
                format!("unknown format {suffix:?}; known formats: {}", known.join(", ")),
            )
        })
    }

    /// Splits a file name into what stands before the format's suffix and the format; the longest suffix wins.
    pub fn split_file_name(name: &str) -> Option<(&str, Self)> {
        Self::ALL
            .into_iter()
            .filter_map(|format| {
                let stem = name.strip_suffix(format.suffix())?.strip_suffix('.')?;
                (!stem.is_empty()).then_some((stem, format))
            })
            .min_by_key(|(stem, _)| stem.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_suffix_wins() {
        assert_eq!(OutputFormat::split_file_name("web.fixed.vhd"), Some(("web", OutputFormat::FixedVhd)));
        assert_eq!(OutputFormat::split_file_name("web.vhd"), Some(("web", OutputFormat::Vhd)));
        assert_eq!(OutputFormat::split_file_name(".vhd"), None);
        assert_eq!(OutputFormat::split_file_name("web"), None);
        for format in OutputFormat::ALL {
            assert_eq!(OutputFormat::from_suffix(format.suffix()).unwrap(), format);
            let plain = OutputFormat::of_image(format.image_format());
            assert_eq!(plain.image_format(), format.image_format());
            assert_eq!(OutputFormat::of_file_name(&format!("a.{}", format.suffix())), Some(format));
        }
        assert_eq!(OutputFormat::of_file_name("WEB.VHD"), Some(OutputFormat::Vhd));
        assert_eq!(OutputFormat::of_file_name("web.img"), Some(OutputFormat::Raw));
        assert_eq!(OutputFormat::of_file_name("web.txt"), None);
    }
}
