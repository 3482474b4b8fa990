//! ELF files: as the flat bytes that a boot loader puts into memory, and their symbols.

use anyhow::{Context, Result, bail, ensure};
use object::elf::{EM_AARCH64, FileHeader64, PT_LOAD};
use object::read::elf::{ElfFile64, FileHeader, ProgramHeader};
use object::{LittleEndian, Object, ObjectSection, ObjectSymbol};
use std::collections::HashMap;

/// An image that spans more than this is a mistake in a linker script.
const MAX_SPAN: u64 = 64 << 20;

/// Returns the file content of all loadable segments, each at its physical address, from the lowest one
/// on. What has no content (`.bss`) at the end is not part of the result.
pub(crate) fn flatten(elf: &[u8]) -> Result<Vec<u8>> {
    let file = ElfFile64::<LittleEndian>::parse(elf).context("not an ELF file for this machine")?;
    let mut segments = Vec::new();
    for header in file.elf_program_headers() {
        if header.p_type(LittleEndian) == PT_LOAD && header.p_filesz(LittleEndian) > 0 {
            let Ok(data) = header.data(LittleEndian, elf) else {
                bail!("a segment is beyond the end of the file")
            };
            segments.push((header.p_paddr(LittleEndian), data));
        }
    }
    let base = segments.iter().map(|(address, _)| *address).min().context("nothing to load")?;
    let mut flat = Vec::new();
    for (address, data) in segments {
        let start = address - base;
        ensure!(start < MAX_SPAN, "the image spans {start:#x} bytes");
        let start = usize::try_from(start)?;
        let end = start + data.len();
        flat.resize(flat.len().max(end), 0);
        flat[start..end].copy_from_slice(data);
    }
    Ok(flat)
}

/// Returns the flat bytes of a program for the bare machine, which is entered at the first of them.
pub(crate) fn flatten_program(elf: &[u8]) -> Result<Vec<u8>> {
    let flat = flatten(elf)?;
    let header = FileHeader64::<LittleEndian>::parse(elf).context("not an ELF file for this machine")?;
    ensure!(header.e_machine(LittleEndian) == EM_AARCH64, "it is not for AArch64");
    let segments = header.program_headers(LittleEndian, elf).context("no program headers")?;
    let loaded = segments.iter().filter(|segment| segment.p_type(LittleEndian) == PT_LOAD);
    let first = loaded
        .filter(|segment| segment.p_filesz(LittleEndian) > 0)
        .min_by_key(|segment| segment.p_paddr(LittleEndian))
        .context("nothing to load")?;
    let (entry, start) = (header.e_entry(LittleEndian), first.p_vaddr(LittleEndian));
    ensure!(entry == start, "its entry {entry:#x} is not its first byte, {start:#x}");
    Ok(flat)
}

/// Cuts off what no loader reads: sections, with them symbols and what debuggers want. Program headers and
/// segments stay where they are.
pub(crate) fn without_sections(mut elf: Vec<u8>) -> Result<Vec<u8>> {
    /// Fields of the file header: `e_shoff`, and `e_shnum` with `e_shstrndx` behind it (ELF-64, figure 2).
    const SECTION_FIELDS: [std::ops::Range<usize>; 2] = [0x28..0x30, 0x3c..0x40];
    let header = FileHeader64::<LittleEndian>::parse(&*elf).context("not an ELF file for this machine")?;
    let segments = header.program_headers(LittleEndian, &*elf).context("no program headers")?;
    let headers_end = header.e_phoff(LittleEndian).saturating_add(size_of_val(segments) as u64);
    let ends = segments
        .iter()
        .map(|segment| segment.p_offset(LittleEndian).saturating_add(segment.p_filesz(LittleEndian)));
    let end = usize::try_from(ends.max().unwrap_or(0).max(headers_end))?;
    ensure!(end <= elf.len(), "a segment is beyond the end of the file");
    elf.truncate(end);
    for field in SECTION_FIELDS {
        elf.get_mut(field).context("shorter than an ELF header")?.fill(0);
    }
    Ok(elf)
}

/// Returns all symbols with their values.
pub(crate) fn symbols(elf: &[u8]) -> Result<HashMap<String, u64>> {
    let file = ElfFile64::<LittleEndian>::parse(elf).context("not an ELF file for this machine")?;
    let named = file.symbols().filter_map(|symbol| Some((symbol.name().ok()?.to_owned(), symbol.address())));
    Ok(named.collect())
}

/// A section: where it lies, what is in it, and address and name of each symbol in it.
#[derive(Debug)]
pub(crate) struct Section<'a> {
    pub(crate) address: u64,
    pub(crate) content: &'a [u8],
    pub(crate) symbols: Vec<(u64, String)>,
}

/// Returns the section of a name.
pub(crate) fn section<'a>(elf: &'a [u8], name: &str) -> Result<Section<'a>> {
    let file = ElfFile64::<LittleEndian>::parse(elf).context("not an ELF file for this machine")?;
    let section = file.section_by_name(name).with_context(|| format!("no section {name}"))?;
    let symbols = file.symbols().filter(|symbol| symbol.section_index() == Some(section.index()));
    let symbols =
        symbols.filter_map(|symbol| Some((symbol.address(), symbol.name().ok()?.to_owned()))).collect();
    Ok(Section { address: section.address(), content: section.data()?, symbols })
}

/// Checks that flat bytes begin with an arm64 Linux image header that covers them
/// (Linux `Documentation/arch/arm64/booting.rst`, section 4).
pub(crate) fn check_arm64_header(flat: &[u8]) -> Result<()> {
    let header = flat.get(..64).context("shorter than an image header")?;
    ensure!(&header[56..60] == b"ARM\x64", "no arm64 image header: the magic is missing");
    let image_size = u64::from_le_bytes(header[16..24].try_into().expect("8 bytes"));
    ensure!(
        image_size >= flat.len() as u64,
        "image_size in the header is {image_size:#x}, but the image has {:#x} bytes",
        flat.len()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A minimal ELF64 file with the given (physical address, content, size in memory) segments.
    fn elf_with(segments: &[(u64, &[u8], u64)]) -> Vec<u8> {
        let mut file = vec![0; 64];
        file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        file[16..18].copy_from_slice(&2u16.to_le_bytes());
        file[18..20].copy_from_slice(&183u16.to_le_bytes());
        file[20] = 1;
        file[32..40].copy_from_slice(&64u64.to_le_bytes());
        file[52..54].copy_from_slice(&64u16.to_le_bytes());
        file[54..56].copy_from_slice(&56u16.to_le_bytes());
        file[56..58].copy_from_slice(&u16::try_from(segments.len()).unwrap().to_le_bytes());
        let mut offset = 64 + 56 * segments.len() as u64;
        for (address, content, memory) in segments {
            file.extend_from_slice(&1u32.to_le_bytes());
            file.extend_from_slice(&5u32.to_le_bytes());
            let virtual_address = address + 0xffff_0000_0000;
            for value in [offset, virtual_address, *address, content.len() as u64, *memory, 4096] {
                file.extend_from_slice(&value.to_le_bytes());
            }
            offset += content.len() as u64;
        }
        for (_, content, _) in segments {
            file.extend_from_slice(content);
        }
        file
    }

    #[test]
    fn segments_lie_at_their_physical_distance_and_bss_is_left_out() {
        let elf = elf_with(&[(0x4200_0010, b"BB", 0x1000), (0x4200_0000, b"AAAA", 4)]);
        assert_eq!(flatten(&elf).unwrap(), b"AAAA\0\0\0\0\0\0\0\0\0\0\0\0BB");
    }

    #[test]
    fn a_program_without_sections_has_all_that_is_loaded() {
        let whole = elf_with(&[(0x1000, b"code", 4), (0x2000, b"data", 16)]);
        let mut with_more = whole.clone();
        with_more.extend_from_slice(&[7; 512]);
        with_more[0x28..0x30].copy_from_slice(&(whole.len() as u64).to_le_bytes());
        with_more[0x3a..0x3e].copy_from_slice(&[64, 0, 8, 0]);
        let cut = without_sections(with_more).unwrap();
        assert_eq!(cut.len(), whole.len());
        assert_eq!(flatten(&cut).unwrap(), flatten(&whole).unwrap());
        assert!(without_sections(b"not an ELF file".to_vec()).is_err());
    }

    #[test]
    fn rubbish_and_absurd_spans_are_refused() {
        assert!(flatten(b"not an ELF file").is_err());
        assert!(flatten(&elf_with(&[])).is_err());
        assert!(flatten(&elf_with(&[(0, b"a", 1), (1 << 40, b"b", 1)])).is_err());
        let mut torn = elf_with(&[(0, b"abcdef", 6)]);
        torn.pop();
        assert!(flatten(&torn).is_err());
    }

    #[test]
    fn a_header_that_does_not_cover_the_image_is_refused() {
        let mut image = vec![0; 4096];
        image[56..60].copy_from_slice(b"ARM\x64");
        assert!(check_arm64_header(&image).is_err());
        image[16..24].copy_from_slice(&4096u64.to_le_bytes());
        check_arm64_header(&image).unwrap();
        image[56] = 0;
        assert!(check_arm64_header(&image).is_err());
        assert!(check_arm64_header(&image[..10]).is_err());
    }
}
