//! The machine's RAM as a file: QEMU maps it shared, so it shows from outside what a run left behind.

use crate::secret::{PIECE, Pattern};
use crate::ui::Task;
use anyhow::{Context, Result, ensure};
use rustix::fs::{SeekFrom, seek};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Physical address of the first byte of RAM on QEMU's `virt` machine.
pub(crate) const RAM_BASE: u64 = 0x4000_0000;

const CHUNK: usize = 1 << 20;

/// A sparse file of the size of the machine's RAM. Its name goes when QEMU has opened it (or when this
/// value goes), so that nothing stays behind.
#[derive(Debug)]
pub(crate) struct RamFile {
    file: File,
    size: u64,
    path: PathBuf,
}

/// What a search found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// Physical addresses at which a piece of the secret stands.
    pub(crate) addresses: Vec<u64>,
    /// Bytes that were not a hole of the file, all of which were looked at.
    pub(crate) searched: u64,
}

impl RamFile {
    /// Makes the file in `folder`.
    pub(crate) fn create(folder: &Path, size: u64) -> Result<Self> {
        // Several machines run at the same time.
        static MADE: AtomicUsize = AtomicUsize::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!("ram-{}-{number}", std::process::id()));
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .with_context(|| format!("cannot make {}", path.display()))?;
        file.set_len(size)?;
        Ok(Self { file, size, path })
    }

    /// The name to give to QEMU.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the name away; content stays reachable through this value.
    pub(crate) fn unlink(&self) {
        // It may be gone already: nothing to do then.
        let _ = std::fs::remove_file(&self.path);
    }

    /// Reads `buffer.len()` bytes at a physical address.
    pub(crate) fn read(&self, address: u64, buffer: &mut [u8]) -> Result<()> {
        let offset = address.checked_sub(RAM_BASE).filter(|offset| *offset < self.size);
        let offset = offset.with_context(|| format!("{address:#x} is not RAM"))?;
        self.file.read_exact_at(buffer, offset).with_context(|| format!("cannot read RAM at {address:#x}"))
    }

    /// Searches all of RAM for any piece of a secret. Holes of the file read as zero and are passed over.
    pub(crate) fn search(&self, pattern: &Pattern) -> Result<Found> {
        let task = Task::counted("searching all of RAM for the secret", self.size);
        let mut found = Found { addresses: Vec::new(), searched: 0 };
        let mut buffer = vec![0; CHUNK];
        let mut position = 0;
        while let Some((start, end)) = self.next_extent(position)? {
            let mut at = start;
            loop {
                let length = usize::try_from(end - at)?.min(CHUNK);
                let bytes = &mut buffer[..length];
                self.file.read_exact_at(bytes, at)?;
                found
                    .addresses
                    .extend(pattern.find(bytes).iter().map(|&offset| RAM_BASE + at + offset as u64));
                task.at(at);
                if at + length as u64 == end {
                    break;
                }
                // The next chunk begins early enough to see a piece that this one cut in two.
                at += (length - (PIECE - 1)) as u64;
            }
            found.searched += end - start;
            position = end;
        }
        task.done(&format!("{} of {} MiB hold data", found.searched >> 20, self.size >> 20));
        Ok(found)
    }

    /// The next stretch of the file, from `position` on, that is not a hole.
    fn next_extent(&self, position: u64) -> Result<Option<(u64, u64)>> {
        if position >= self.size {
            return Ok(None);
        }
        let start = match seek(&self.file, SeekFrom::Data(position)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(None),
            Err(error) => return Err(error).context("cannot look for data in the RAM file"),
        };
        let end = seek(&self.file, SeekFrom::Hole(start)).context("cannot look for holes in the RAM file")?;
        ensure!(end > start, "the file system reports an empty stretch of data");
        Ok(Some((start, end)))
    }
}

impl Drop for RamFile {
    fn drop(&mut self) {
        self.unlink();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::derive;

    /// A RAM file in a folder of its own, since its name has only the process in it.
    fn ram(name: &str, size: u64) -> RamFile {
        let folder = std::env::temp_dir().join(format!("deed-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let ram = RamFile::create(&folder, size).unwrap();
        ram.unlink();
        std::fs::remove_dir(&folder).unwrap();
        ram
    }

    #[test]
    fn a_secret_is_found_wherever_it_lies_and_holes_are_passed_over() {
        let ram = ram("search", 16 << 30);
        let secret = derive(5);
        let chunk = CHUNK as u64;
        // In the middle of nowhere; across the end of a chunk; in the last bytes of RAM.
        let offsets = [0x1_2345_6780, 0x3_0000_0000 + chunk - 5, (16 << 30) - PIECE as u64];
        ram.file.write_all_at(&vec![0xff; 3 * CHUNK], 0x3_0000_0000).unwrap();
        for offset in offsets {
            ram.file.write_all_at(&secret[..PIECE], offset).unwrap();
        }
        let found = ram.search(&Pattern::of_nonce(5)).unwrap();
        assert_eq!(found.addresses, offsets.map(|offset| RAM_BASE + offset));
        assert!(found.searched < 8 << 20, "{} bytes were searched", found.searched);
        assert!(ram.search(&Pattern::of_nonce(6)).unwrap().addresses.is_empty());
    }

    #[test]
    fn what_is_not_ram_cannot_be_read() {
        let ram = ram("read", 8192);
        let mut buffer = [0; 8];
        ram.read(RAM_BASE, &mut buffer).unwrap();
        for address in [0, RAM_BASE - 8, RAM_BASE + 8192, RAM_BASE + 8188, u64::MAX] {
            assert!(ram.read(address, &mut buffer).is_err(), "{address:#x}");
        }
    }
}
