//! The header of an arm64 Linux image (Linux `Documentation/arch/arm64/booting.rst`).

/// Bytes of the header.
pub const HEADER_SIZE: usize = 64;
const MAGIC: [u8; 4] = *b"ARM\x64";
const MAGIC_AT: usize = 56;
const TEXT_OFFSET_AT: usize = 8;
const IMAGE_SIZE_AT: usize = 16;
const FLAGS_AT: usize = 24;
const FLAG_BIG_ENDIAN: u64 = 1 << 0;
/// An image lies `text_offset` bytes behind such a boundary.
const BASE_ALIGNMENT: u64 = 2 << 20;

/// What an image says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageHeader {
    /// Distance from a 2 MiB boundary.
    pub text_offset: u64,
    /// Bytes that it needs from its start, what is not in the file (.bss) included; 0 in very old images.
    pub image_size: u64,
    flags: u64,
}

/// Why something is no image that can be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageError {
    /// It does not carry the magic number.
    NoImage,
    /// It is big-endian.
    BigEndian,
    /// It does not lie `text_offset` behind a 2 MiB boundary.
    Misplaced,
}

impl ImageHeader {
    /// Reads the header of an image that lies at `address`.
    pub fn parse(header: &[u8; HEADER_SIZE], address: u64) -> Result<Self, ImageError> {
        if header.get(MAGIC_AT..).and_then(|rest| rest.first_chunk()) != Some(&MAGIC) {
            return Err(ImageError::NoImage);
        }
        let word = |at: usize| {
            let bytes = header.get(at..).and_then(|rest| rest.first_chunk());
            bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
        };
        let image = Self {
            text_offset: word(TEXT_OFFSET_AT),
            image_size: word(IMAGE_SIZE_AT),
            flags: word(FLAGS_AT),
        };
        if image.flags & FLAG_BIG_ENDIAN != 0 {
            return Err(ImageError::BigEndian);
        }
        if !address.wrapping_sub(image.text_offset).is_multiple_of(BASE_ALIGNMENT) {
            return Err(ImageError::Misplaced);
        }
        Ok(image)
    }
}

#[cfg(test)]
pub(super) fn header(text_offset: u64, image_size: u64, flags: u64) -> [u8; HEADER_SIZE] {
    let mut header = [0; HEADER_SIZE];
    header[TEXT_OFFSET_AT..][..8].copy_from_slice(&text_offset.to_le_bytes());
    header[IMAGE_SIZE_AT..][..8].copy_from_slice(&image_size.to_le_bytes());
    header[FLAGS_AT..][..8].copy_from_slice(&flags.to_le_bytes());
    header[MAGIC_AT..][..4].copy_from_slice(&MAGIC);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_known_by_its_magic_and_must_be_little_endian() {
        let good = header(0, 0x1000, 0xa);
        assert_eq!(ImageHeader::parse(&good, 0x4200_0000).map(|image| image.image_size), Ok(0x1000));
        assert_eq!(ImageHeader::parse(&[0; HEADER_SIZE], 0), Err(ImageError::NoImage));
        assert_eq!(ImageHeader::parse(&header(0, 0, 1), 0), Err(ImageError::BigEndian));
    }

    #[test]
    fn an_image_lies_its_text_offset_behind_a_boundary() {
        let image = header(0x8_0000, 0x1000, 0);
        assert!(ImageHeader::parse(&image, 0x4208_0000).is_ok());
        for address in [0x4200_0000, 0x4208_1000, 0] {
            assert_eq!(ImageHeader::parse(&image, address), Err(ImageError::Misplaced), "{address:#x}");
        }
    }
}
