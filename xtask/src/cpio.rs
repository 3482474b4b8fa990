//! Writes a cpio archive in the "newc" form, which is what a Linux initramfs is.

/// An archive under construction. The same files give the same bytes: no times, no owners.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    inodes: u32,
}

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;

impl Archive {
    /// Adds a folder. Its parents must have been added before.
    pub(crate) fn directory(&mut self, name: &str) {
        self.entry(name, DIRECTORY, &[]);
    }

    /// Adds a file.
    pub(crate) fn file(&mut self, name: &str, content: &[u8]) {
        self.entry(name, EXECUTABLE, content);
    }

    /// Ends the archive and returns its bytes.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.inodes += 1;
        let links = 1;
        let (size, name_size) = (length(content.len()), length(name.len() + 1));
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let fields = [self.inodes, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("a file of a ramdisk is smaller than 4 GiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads an archive back, as a kernel would.
    fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let start = bytes.len();
        let mut entries = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |n: usize| {
                let text = std::str::from_utf8(&bytes[6 + n * 8..14 + n * 8]).unwrap();
                u32::from_str_radix(text, 16).unwrap() as usize
            };
            let (mode, size, name_size) = (field(1), field(6), field(11));
            let name = std::str::from_utf8(&bytes[110..110 + name_size - 1]).unwrap().to_owned();
            assert_eq!(bytes[110 + name_size - 1], 0);
            let data = (110 + name_size).next_multiple_of(4);
            let content = bytes[data..data + size].to_vec();
            bytes = &bytes[(data + size).next_multiple_of(4)..];
            assert_eq!((start - bytes.len()) % 4, 0);
            if name == "TRAILER!!!" {
                assert!(bytes.is_empty());
                return entries;
            }
            entries.push((name, mode as u32, content));
        }
    }

    #[test]
    fn what_was_written_can_be_read_back() {
        let mut archive = Archive::default();
        archive.directory("bin");
        archive.file("bin/a", b"12345");
        archive.file("bin/empty", b"");
        let expected = [
            ("bin".to_owned(), DIRECTORY, vec![]),
            ("bin/a".to_owned(), EXECUTABLE, b"12345".to_vec()),
            ("bin/empty".to_owned(), EXECUTABLE, vec![]),
        ];
        assert_eq!(read(&archive.finish()), expected);
    }
}
