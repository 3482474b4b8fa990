//! ELF programs: static, 64-bit, AArch64, linked to fixed addresses.
//!
//! A file is parsed into what to map and is refused as a whole if anything in it is out of place.

use core::ops::Range;

use alloc::vec::Vec;

use crate::errno::Errno;
use crate::mm::{PAGE, Prot, page_down, page_up, space::USER};

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const MAX_PROGRAM_HEADERS: u16 = 32;
const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;

/// Why a file is no program for this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElfError {
    /// It ends too early.
    Truncated,
    /// It is no little-endian 64-bit ELF file of version 1.
    NotElf,
    /// It is for another machine.
    WrongMachine,
    /// It is not linked to fixed addresses, or wants an interpreter.
    NotStatic,
    /// Its program headers are not what they should be.
    BadProgramHeaders,
    /// A segment lies outside the addresses of programs, wraps, or has more bytes than memory.
    BadSegment,
    /// Two segments share a page.
    Overlap,
    /// The entry point is in no executable segment.
    BadEntry,
}

impl From<ElfError> for Errno {
    fn from(_: ElfError) -> Self {
        Self::ENOEXEC
    }
}

/// A segment to map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    /// Whole pages.
    pub range: Range<u64>,
    /// What the program may do there.
    pub prot: Prot,
    /// Where its bytes go.
    pub address: u64,
    /// Its bytes; what follows them is zero.
    pub bytes: &'a [u8],
}

/// A program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image<'a> {
    /// Where it starts.
    pub entry: u64,
    /// What to map.
    pub segments: Vec<Segment<'a>>,
    /// Address of the program headers in memory, 0 if no segment holds them.
    pub headers: u64,
    /// Number of program headers.
    pub header_count: u16,
    /// First page behind the last segment.
    pub end: u64,
}

fn field<const N: usize>(bytes: &[u8], offset: usize) -> Result<[u8; N], ElfError> {
    let end = offset.checked_add(N).ok_or(ElfError::Truncated)?;
    let slice = bytes.get(offset..end).ok_or(ElfError::Truncated)?;
    slice.try_into().map_err(|_| ElfError::Truncated)
}

fn u16_at(bytes: &[u8], offset: usize) -> Result<u16, ElfError> {
    field(bytes, offset).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], offset: usize) -> Result<u32, ElfError> {
    field(bytes, offset).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], offset: usize) -> Result<u64, ElfError> {
    field(bytes, offset).map(u64::from_le_bytes)
}

impl<'a> Image<'a> {
    /// Parses a file.
    pub fn parse(file: &'a [u8]) -> Result<Self, ElfError> {
        let header = file.get(..HEADER).ok_or(ElfError::Truncated)?;
        if !header.starts_with(b"\x7fELF\x02\x01\x01") {
            return Err(ElfError::NotElf);
        }
        if u16_at(header, 18)? != 183 {
            return Err(ElfError::WrongMachine);
        }
        if u16_at(header, 16)? != 2 {
            return Err(ElfError::NotStatic);
        }
        let entry = u64_at(header, 24)?;
        let table = u64_at(header, 32)?;
        let header_count = u16_at(header, 56)?;
        if u16_at(header, 54)? as usize != PROGRAM_HEADER
            || header_count == 0
            || header_count > MAX_PROGRAM_HEADERS
        {
            return Err(ElfError::BadProgramHeaders);
        }
        let start = usize::try_from(table).map_err(|_| ElfError::BadProgramHeaders)?;
        let length = PROGRAM_HEADER.saturating_mul(header_count.into());
        let end = start.checked_add(length).ok_or(ElfError::BadProgramHeaders)?;
        let headers = file.get(start..end).ok_or(ElfError::BadProgramHeaders)?;

        let mut segments: Vec<Segment<'a>> = Vec::new();
        for header in headers.chunks_exact(PROGRAM_HEADER) {
            match u32_at(header, 0)? {
                PT_LOAD => segments.extend(segment(file, header)?),
                PT_INTERP => return Err(ElfError::NotStatic),
                _ => (),
            }
        }
        segments.sort_by_key(|segment| segment.range.start);
        for pair in segments.windows(2) {
            if let [first, second] = pair
                && first.range.end > second.range.start
            {
                return Err(ElfError::Overlap);
            }
        }
        let executable = |segment: &&Segment| segment.prot.contains(Prot::EXEC);
        if !segments.iter().filter(executable).any(|segment| segment.range.contains(&entry)) {
            return Err(ElfError::BadEntry);
        }
        let in_memory = segments.iter().find_map(|segment| address_of(file, segment, start));
        let end = segments.last().map_or(USER.start, |segment| segment.range.end);
        Ok(Self { entry, segments, headers: in_memory.unwrap_or(0), header_count, end })
    }
}

fn segment<'a>(file: &'a [u8], header: &[u8]) -> Result<Option<Segment<'a>>, ElfError> {
    let flags = u32_at(header, 4)?;
    let (offset, address) = (u64_at(header, 8)?, u64_at(header, 16)?);
    let (file_size, memory_size) = (u64_at(header, 32)?, u64_at(header, 40)?);
    if memory_size == 0 {
        return Ok(None);
    }
    let end = address.checked_add(memory_size).and_then(page_up).ok_or(ElfError::BadSegment)?;
    let range = page_down(address)..end;
    if file_size > memory_size
        || range.start < USER.start
        || range.end > USER.end
        || offset % PAGE != address % PAGE
    {
        return Err(ElfError::BadSegment);
    }
    let start = usize::try_from(offset).map_err(|_| ElfError::Truncated)?;
    let length = usize::try_from(file_size).map_err(|_| ElfError::Truncated)?;
    let bytes = file.get(start..).and_then(|rest| rest.get(..length)).ok_or(ElfError::Truncated)?;
    let mut prot = Prot::empty();
    for (bit, flag) in [(4, Prot::READ), (2, Prot::WRITE), (1, Prot::EXEC)] {
        prot.set(flag, flags & bit != 0);
    }
    if prot.contains(Prot::WRITE | Prot::EXEC) {
        return Err(ElfError::BadSegment);
    }
    Ok(Some(Segment { range, prot, address, bytes }))
}

/// Where a byte of the file is in memory, if this segment holds it.
fn address_of(file: &[u8], segment: &Segment<'_>, position: usize) -> Option<u64> {
    let start = (segment.bytes.as_ptr() as usize).checked_sub(file.as_ptr() as usize)?;
    let place = position.checked_sub(start).filter(|place| *place < segment.bytes.len())?;
    segment.address.checked_add(place as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program() -> Vec<u8> {
        let mut file = alloc::vec![0u8; 0x1100];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"\x7fELF\x02\x01\x01");
        put(16, &2u16.to_le_bytes());
        put(18, &183u16.to_le_bytes());
        put(24, &0x40_0010u64.to_le_bytes());
        put(32, &64u64.to_le_bytes());
        put(54, &56u16.to_le_bytes());
        put(56, &2u16.to_le_bytes());
        for (at, flags, offset, address, size, memory) in
            [(64, 5u32, 0u64, 0x40_0000u64, 0x200u64, 0x200u64), (120, 6, 0x1000, 0x40_1000, 0x100, 0x3000)]
        {
            put(at, &1u32.to_le_bytes());
            put(at + 4, &flags.to_le_bytes());
            put(at + 8, &offset.to_le_bytes());
            put(at + 16, &address.to_le_bytes());
            put(at + 32, &size.to_le_bytes());
            put(at + 40, &memory.to_le_bytes());
        }
        file
    }

    fn with(at: usize, bytes: &[u8]) -> Result<usize, ElfError> {
        let mut file = program();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        Image::parse(&file).map(|image| image.segments.len())
    }

    #[test]
    fn a_good_file_tells_its_segments_entry_and_headers() {
        let file = program();
        let image = Image::parse(&file).unwrap();
        assert_eq!(image.entry, 0x40_0010);
        assert_eq!(image.headers, 0x40_0040);
        assert_eq!(image.segments[0].prot, Prot::READ | Prot::EXEC);
        assert_eq!(image.segments[1].range, 0x40_1000..0x40_4000);
        assert_eq!(image.segments[1].bytes.len(), 0x100);
        assert_eq!(image.end, 0x40_4000);
    }

    #[test]
    fn foreign_files_are_refused() {
        assert_eq!(with(0, b"\x7fELG"), Err(ElfError::NotElf));
        assert_eq!(with(4, &[1]), Err(ElfError::NotElf));
        assert_eq!(with(5, &[2]), Err(ElfError::NotElf));
        assert_eq!(with(18, &[62]), Err(ElfError::WrongMachine));
        assert_eq!(with(16, &[3]), Err(ElfError::NotStatic));
        assert_eq!(with(64, &[3]), Err(ElfError::NotStatic));
    }

    #[test]
    fn absurd_tables_and_segments_are_refused() {
        assert_eq!(with(54, &[32]), Err(ElfError::BadProgramHeaders));
        assert_eq!(with(56, &[0, 0]), Err(ElfError::BadProgramHeaders));
        assert_eq!(with(56, &[0xff, 0xff]), Err(ElfError::BadProgramHeaders));
        assert_eq!(with(32, &[0xff; 8]), Err(ElfError::BadProgramHeaders));
        assert_eq!(with(32, &0x10f0u64.to_le_bytes()), Err(ElfError::BadProgramHeaders));
        assert_eq!(with(120 + 16, &u64::MAX.to_le_bytes()), Err(ElfError::BadSegment));
        assert_eq!(with(120 + 16, &0u64.to_le_bytes()), Err(ElfError::BadSegment));
        assert_eq!(with(120 + 16, &0x40_1008u64.to_le_bytes()), Err(ElfError::BadSegment));
        assert_eq!(with(120 + 32, &0x4000u64.to_le_bytes()), Err(ElfError::BadSegment));
        assert_eq!(with(120 + 40, &u64::MAX.to_le_bytes()), Err(ElfError::BadSegment));
        assert_eq!(with(120 + 32, &0x200u64.to_le_bytes()), Err(ElfError::Truncated));
        assert_eq!(with(120 + 8, &0x8000_0000_0000_0000u64.to_le_bytes()), Err(ElfError::Truncated));
        assert_eq!(with(120 + 4, &[7]), Err(ElfError::BadSegment));
        assert_eq!(with(120 + 16, &0x40_0000u64.to_le_bytes()), Err(ElfError::Overlap));
        assert_eq!(with(24, &0x40_1000u64.to_le_bytes()), Err(ElfError::BadEntry));
    }

    #[test]
    fn a_file_cut_anywhere_never_panics() {
        let file = program();
        for length in 0..file.len() {
            assert!(Image::parse(&file[..length]).is_err(), "{length}");
        }
    }
}
