//! What the host reads from its ramdisk: archives and programs. Neither is the hypervisor's input, but a host that
//! falls over a file tells a tester nothing.

use crate::Outcomes;
use crate::input::Input;
use host_stub::fs::cpio::Archive;
use host_stub::mm::space::USER;
use host_stub::process::elf::Image;
use std::mem::discriminant;

/// Plays one input: an archive or a program.
///
/// # Panics
/// If a promise is broken.
pub fn run(data: &[u8], outcomes: &mut Outcomes) {
    let mut input = Input::new(data);
    match input.byte() & 1 {
        0 => archive(input.rest(), outcomes),
        _ => program(input.rest(), outcomes),
    }
}

fn is_within(part: &[u8], whole: &[u8]) -> bool {
    part.is_empty()
        || whole.as_ptr_range().contains(&part.as_ptr())
            && part.as_ptr_range().end <= whole.as_ptr_range().end
}

fn archive(bytes: &[u8], outcomes: &mut Outcomes) {
    let archive = Archive::new(bytes);
    let mut entries = 0;
    let mut failed = false;
    for entry in archive.entries() {
        assert!(!failed, "the archive goes on after an error");
        match entry {
            Ok(entry) => {
                assert!(is_within(entry.name, bytes) && is_within(entry.data, bytes));
                assert!(!entry.name.contains(&0) && !entry.name.starts_with(b"/"));
                outcomes.note(("entry", entry.is_file(), entry.data.is_empty(), entries.min(4)));
                entries += 1;
                assert!(entries * 110 <= bytes.len(), "more entries than there is room for headers");
            }
            Err(error) => {
                outcomes.note(("archive", discriminant(&error), entries.min(4)));
                failed = true;
            }
        }
    }
    if !failed {
        outcomes.note(("archive ends", entries.min(8)));
        for entry in archive.entries().flatten().filter(|entry| entry.is_file()) {
            let found =
                archive.find(entry.name).expect("an archive that was read").expect("an entry that was seen");
            assert_eq!(found.name, entry.name);
        }
    }
}

fn program(bytes: &[u8], outcomes: &mut Outcomes) {
    let image = match Image::parse(bytes) {
        Ok(image) => image,
        Err(error) => return outcomes.note(("program", discriminant(&error))),
    };
    outcomes.note(("program", image.segments.len(), image.headers != 0));
    let mut last = USER.start;
    for segment in &image.segments {
        let range = &segment.range;
        outcomes.note(("segment", segment.prot.bits(), segment.bytes.is_empty()));
        assert!(last <= range.start && range.start < range.end && range.end <= USER.end, "{range:x?}");
        assert!(range.start.is_multiple_of(4096) && range.end.is_multiple_of(4096));
        let end = segment.address.checked_add(segment.bytes.len() as u64).expect("bytes that wrap");
        assert!(range.start <= segment.address && end <= range.end, "bytes outside their segment");
        assert!(is_within(segment.bytes, bytes));
        last = range.end;
    }
    assert_eq!(image.end, last);
    assert!(image.segments.iter().any(|segment| segment.range.contains(&image.entry)));
}
