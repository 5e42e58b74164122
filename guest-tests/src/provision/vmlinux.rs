//! Takes the ELF image out of a bzImage, so that a VMM need not run the kernel's own decompressor: under emulation
//! that is the longest part of a boot. Fields are those of the Linux x86 boot protocol (Documentation/arch/x86/boot.rst).

use std::io::{self, Read};

const SETUP_SECTORS: usize = 0x1f1;
const HEADER_MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const KERNEL_VERSION: usize = 0x20e;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const SECTOR_BYTES: usize = 512;
/// First protocol version with a payload description.
const FIRST_WITH_PAYLOAD: u16 = 0x208;

/// An image that does not give its payload up.
#[derive(Debug, thiserror::Error)]
pub enum ExtractError {
    /// Not a bzImage.
    #[error("it is not a bzImage: it has no setup header")]
    NotBzImage,
    /// Too old.
    #[error("boot protocol {version:#x} does not describe the payload")]
    TooOld {
        /// What the header says.
        version: u16,
    },
    /// Too short.
    #[error("it is truncated: it ends before byte {end}")]
    Truncated {
        /// Where it should reach.
        end: usize,
    },
    /// Neither xz nor zstd.
    #[error("its payload starts with {start:02x?}, which is neither xz nor zstd")]
    Compression {
        /// The first bytes.
        start: Vec<u8>,
    },
    /// Damaged.
    #[error("its payload cannot be decompressed")]
    Damaged(#[from] io::Error),
    /// Something else was packed.
    #[error("its payload is no ELF image")]
    NotElf,
}

/// The kernel's release, from the text that the header points to.
pub(super) fn release_of(image: &[u8]) -> Result<String, ExtractError> {
    check_header(image)?;
    let start = usize::from(u16_at(image, KERNEL_VERSION)?) + SECTOR_BYTES;
    let text = image
        .get(start..)
        .ok_or(ExtractError::Truncated { end: start })?;
    let end = text
        .iter()
        .position(|byte| *byte == 0 || *byte == b' ')
        .unwrap_or(text.len().min(64));
    Ok(String::from_utf8_lossy(&text[..end]).into_owned())
}

/// The ELF image.
pub(super) fn extract(image: &[u8]) -> Result<Vec<u8>, ExtractError> {
    check_header(image)?;
    let version = u16_at(image, VERSION)?;
    if version < FIRST_WITH_PAYLOAD {
        return Err(ExtractError::TooOld { version });
    }
    // No sectors means four, for very old loaders.
    let sectors = match image[SETUP_SECTORS] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1) * SECTOR_BYTES + u32_at(image, PAYLOAD_OFFSET)?;
    let end = start + u32_at(image, PAYLOAD_LENGTH)?;
    let payload = image
        .get(start..end)
        .ok_or(ExtractError::Truncated { end })?;
    let elf = decompress(payload)?;
    if elf.starts_with(b"\x7fELF") {
        Ok(elf)
    } else {
        Err(ExtractError::NotElf)
    }
}

/// The stream is followed by its length, which the decoders leave alone.
fn decompress(payload: &[u8]) -> Result<Vec<u8>, ExtractError> {
    let mut data = Vec::new();
    if payload.starts_with(b"\xfd7zXZ\0") {
        lzma_rust2::XzReader::new(payload, false).read_to_end(&mut data)?;
    } else if payload.starts_with(b"\x28\xb5\x2f\xfd") {
        let decoder =
            ruzstd::decoding::StreamingDecoder::new_with_max_window_size(payload, 1 << 30);
        decoder.map_err(io::Error::other)?.read_to_end(&mut data)?;
    } else {
        return Err(ExtractError::Compression {
            start: payload[..payload.len().min(6)].to_vec(),
        });
    }
    Ok(data)
}

fn check_header(image: &[u8]) -> Result<(), ExtractError> {
    if image.get(HEADER_MAGIC..HEADER_MAGIC + 4) == Some(b"HdrS") {
        Ok(())
    } else {
        Err(ExtractError::NotBzImage)
    }
}

fn u16_at(image: &[u8], offset: usize) -> Result<u16, ExtractError> {
    let bytes = image
        .get(offset..offset + 2)
        .and_then(|bytes| bytes.try_into().ok());
    bytes
        .map(u16::from_le_bytes)
        .ok_or(ExtractError::Truncated { end: offset + 2 })
}

fn u32_at(image: &[u8], offset: usize) -> Result<usize, ExtractError> {
    let bytes = image
        .get(offset..offset + 4)
        .and_then(|bytes| bytes.try_into().ok());
    bytes
        .map(|bytes| u32::from_le_bytes(bytes) as usize)
        .ok_or(ExtractError::Truncated { end: offset + 4 })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An image of one setup sector and a payload.
    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 2 * SECTOR_BYTES];
        image[SETUP_SECTORS] = 1;
        image[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        image[VERSION..VERSION + 2].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[KERNEL_VERSION..KERNEL_VERSION + 2].copy_from_slice(&0x180_u16.to_le_bytes());
        image[0x380..0x390].copy_from_slice(b"6.1.0-52-amd64 (");
        let length = u32::try_from(payload.len()).unwrap();
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&length.to_le_bytes());
        image.extend(payload);
        image
    }

    /// `\x7fELF` and zeros in one zstd frame with one raw block.
    fn zstd_elf() -> Vec<u8> {
        let content = b"\x7fELF\0\0\0\0";
        let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0x20, 8];
        let block = 1_u32 | (8 << 3);
        frame.extend(&block.to_le_bytes()[..3]);
        frame.extend(content);
        frame
    }

    #[test]
    fn the_payload_is_unpacked_and_what_follows_it_ignored() {
        let mut payload = zstd_elf();
        payload.extend(8_u32.to_le_bytes());
        assert_eq!(extract(&image(&payload)).unwrap(), b"\x7fELF\0\0\0\0");
        assert_eq!(release_of(&image(&payload)).unwrap(), "6.1.0-52-amd64");
    }

    #[test]
    fn what_is_wrong_is_said() {
        assert!(matches!(extract(b"ELF"), Err(ExtractError::NotBzImage)));
        assert!(matches!(
            extract(&image(b"\x1f\x8b\x08")),
            Err(ExtractError::Compression { .. })
        ));
        let whole = image(&zstd_elf());
        assert!(matches!(
            extract(&whole[..whole.len() - 2]),
            Err(ExtractError::Truncated { .. })
        ));
        let mut old = whole.clone();
        old[VERSION] = 7;
        assert!(matches!(
            extract(&old),
            Err(ExtractError::TooOld { version: 0x207 })
        ));
    }
}
