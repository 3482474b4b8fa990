//! The ramdisk: a cpio archive in the "newc" format (magic 070701), read in place.
//!
//! Nothing in the archive is trusted: each header is checked before its name and data are used, and a
//! malformed header ends the archive with an error.

/// Bytes of a header.
const HEADER: usize = 110;
const FIELD: usize = 8;
const MAGIC: [&[u8]; 2] = [b"070701", b"070702"];
const TRAILER: &[u8] = b"TRAILER!!!";
const MODE_TYPE: u32 = 0o170_000;
const MODE_FILE: u32 = 0o100_000;

/// Why an archive cannot be read on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpioError {
    /// It ends in the middle of an entry, or without a trailer.
    Truncated,
    /// A header does not begin with the magic.
    BadMagic,
    /// A field of a header is no hexadecimal number.
    BadNumber,
    /// A name is empty, not terminated or contains a zero byte.
    BadName,
}

impl core::fmt::Display for CpioError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Truncated => "the archive is truncated",
            Self::BadMagic => "bad magic in the archive",
            Self::BadNumber => "bad number in the archive",
            Self::BadName => "bad name in the archive",
        })
    }
}

impl core::error::Error for CpioError {}

/// One entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Its path, without a leading `/` or `./`.
    pub name: &'a [u8],
    /// Linux's mode: type and permissions.
    pub mode: u32,
    /// Its inode number in the archive.
    pub number: u32,
    /// Its content.
    pub data: &'a [u8],
}

impl Entry<'_> {
    /// Whether it is a regular file.
    pub const fn is_file(&self) -> bool {
        self.mode & MODE_TYPE == MODE_FILE
    }
}

/// An archive.
#[derive(Clone, Copy, Debug)]
pub struct Archive<'a> {
    bytes: &'a [u8],
}

impl<'a> Archive<'a> {
    /// An archive in these bytes; they are looked at when it is read.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// Its entries up to the trailer. After an error there are no more.
    pub fn entries(&self) -> Entries<'a> {
        Entries { bytes: self.bytes, position: 0, ended: false }
    }

    /// Finds a regular file by its path, with or without a leading `/`. The last of several entries with
    /// one name counts.
    pub fn find(&self, path: &[u8]) -> Result<Option<Entry<'a>>, CpioError> {
        let path = strip(path);
        let mut found = None;
        for entry in self.entries() {
            let entry = entry?;
            if entry.is_file() && entry.name == path {
                found = Some(entry);
            }
        }
        Ok(found)
    }
}

fn strip(mut path: &[u8]) -> &[u8] {
    while let Some(rest) = path.strip_prefix(b"./").or_else(|| path.strip_prefix(b"/")) {
        path = rest;
    }
    path
}

/// Iterates over entries.
#[derive(Clone, Debug)]
pub struct Entries<'a> {
    bytes: &'a [u8],
    position: usize,
    ended: bool,
}

impl<'a> Entries<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], CpioError> {
        let end = self.position.checked_add(length).ok_or(CpioError::Truncated)?;
        let taken = self.bytes.get(self.position..end).ok_or(CpioError::Truncated)?;
        self.position = end;
        Ok(taken)
    }

    fn align(&mut self) {
        self.position = self.position.next_multiple_of(4).min(self.bytes.len());
    }

    fn read(&mut self) -> Result<Option<Entry<'a>>, CpioError> {
        let header = self.take(HEADER)?;
        let (magic, fields) = header.split_at_checked(6).ok_or(CpioError::Truncated)?;
        if !MAGIC.contains(&magic) {
            return Err(CpioError::BadMagic);
        }
        let field = |index: usize| {
            let digits = fields.chunks_exact(FIELD).nth(index).ok_or(CpioError::Truncated)?;
            hexadecimal(digits).ok_or(CpioError::BadNumber)
        };
        let (number, mode, size, name_size) = (field(0)?, field(1)?, field(6)?, field(11)?);
        let name = self.take(name_size as usize)?;
        let name = name.strip_suffix(&[0]).filter(|name| !name.is_empty() && !name.contains(&0));
        let name = name.ok_or(CpioError::BadName)?;
        self.align();
        if name == TRAILER {
            return Ok(None);
        }
        let data = self.take(size as usize)?;
        self.align();
        Ok(Some(Entry { name: strip(name), mode, number, data }))
    }
}

impl<'a> Iterator for Entries<'a> {
    type Item = Result<Entry<'a>, CpioError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let entry = self.read().transpose();
        self.ended = !matches!(entry, Some(Ok(_)));
        entry
    }
}

fn hexadecimal(digits: &[u8]) -> Option<u32> {
    digits.iter().try_fold(0u32, |value, digit| {
        let digit = char::from(*digit).to_digit(16)?;
        value.checked_mul(16)?.checked_add(digit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    fn entry(name: &[u8], mode: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::from(b"070701".as_slice());
        let fields = [7, mode, 0, 0, 1, 0, data.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        for field in fields {
            bytes.extend(alloc::format!("{field:08x}").into_bytes());
        }
        bytes.extend(name);
        bytes.push(0);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend(data);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn archive(entries: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = entries.concat();
        bytes.extend(entry(TRAILER, 0, b""));
        bytes
    }

    #[test]
    fn files_are_found_by_path_with_or_without_a_root() {
        let bytes = archive(&[
            entry(b"bin", 0o40_755, b""),
            entry(b"./bin/hello", 0o100_755, b"hello, world"),
            entry(b"empty", 0o100_644, b""),
        ]);
        let archive = Archive::new(&bytes);
        assert_eq!(archive.find(b"/bin/hello").unwrap().unwrap().data, b"hello, world");
        assert_eq!(archive.find(b"bin/hello").unwrap().unwrap().number, 7);
        assert_eq!(archive.find(b"/empty").unwrap().unwrap().data, b"");
        assert_eq!(archive.find(b"/bin"), Ok(None));
        assert_eq!(archive.find(b"/absent"), Ok(None));
        assert_eq!(archive.entries().count(), 3);
    }

    #[test]
    fn an_archive_cut_anywhere_is_truncated_and_never_panics() {
        let bytes = archive(&[entry(b"a", 0o100_644, b"12345"), entry(b"b", 0o100_644, b"678")]);
        for length in 0..bytes.len() - 1 {
            let cut = Archive::new(&bytes[..length]);
            let last = cut.entries().last();
            let padding_only = bytes.len() - length < 4;
            assert!(padding_only || last == Some(Err(CpioError::Truncated)), "{length}: {last:?}");
        }
    }

    #[test]
    fn malformed_headers_are_refused() {
        let good = archive(&[entry(b"a", 0o100_644, b"12345")]);
        let with = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            Archive::new(&bytes).find(b"a").err()
        };
        assert_eq!(with(0, b'1'), Some(CpioError::BadMagic));
        assert_eq!(with(20, b'x'), Some(CpioError::BadNumber));
        assert_eq!(with(6 + 8 * 6, b'f'), Some(CpioError::Truncated));
        assert_eq!(with(6 + 8 * 11, b'f'), Some(CpioError::Truncated));
        assert_eq!(with(6 + 8 * 11 + 7, b'0'), Some(CpioError::BadName));
        assert_eq!(with(HEADER, 0), Some(CpioError::BadName));
        assert_eq!(Archive::new(b"").find(b"a"), Err(CpioError::Truncated));
    }

    #[test]
    fn after_an_error_there_are_no_more_entries() {
        let mut entries = Archive::new(b"garbage").entries();
        assert!(entries.next().unwrap().is_err());
        assert!(entries.next().is_none());
    }
}
