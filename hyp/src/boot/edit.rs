//! The host's device tree, made from the one that Deed was given.
//!
//! One pass over the tokens of the old tree, which [`super::tree::read`] has read through, into a scratch buffer:
//! what Deed was told and what the host must not know is left out, what the host needs is added.

use super::blob::{DEFAULT_CELLS, Sink, Source, Token, Tokens};
use super::plan::{Plan, Problem};
use super::tree::TreeError;
use arrayvec::ArrayString;
use core::fmt::Write;

/// Properties of `/chosen` that the host gets from Deed.
const CHOSEN_ANEW: [&[u8]; 3] = [b"bootargs", b"linux,initrd-start", b"linux,initrd-end"];
/// Properties of the timer that the host gets from Deed.
const TIMER_ANEW: [&[u8]; 2] = [b"interrupts", b"interrupt-names"];
/// Properties that refer to an SMMU.
const SMMU_REFERENCES: [&[u8]; 3] = [b"iommu-map", b"iommu-map-mask", b"iommus"];
/// Cells in a `/reserved-memory` that Deed makes.
const OWN_CELLS: (u32, u32) = (2, 2);

/// Why the host's tree cannot be written. Small, unlike [`Problem`], since every step may return it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EditError {
    /// The tree was not validated.
    Malformed,
    /// The scratch buffer is too small.
    NoRoom,
}

impl From<EditError> for Problem {
    fn from(error: EditError) -> Self {
        match error {
            EditError::Malformed => Self::Tree(TreeError::Malformed),
            EditError::NoRoom => Self::NoRoomForTree,
        }
    }
}

/// Writes the host's tree for `plan` into `scratch` and returns its length.
///
/// # Errors
/// See [`EditError`].
pub fn write(plan: &Plan<'_>, blob: &[u8], scratch: &mut [u8]) -> Result<usize, EditError> {
    let source = Source::new(blob).ok_or(EditError::Malformed)?;
    let mut sink = Sink::new(scratch, &source).ok_or(EditError::NoRoom)?;
    let mut pass = Pass { plan, source, depth: 0, section: Section::Other, reserved: None };
    let mut tokens = source.tokens();
    loop {
        let token = tokens.next().ok_or(EditError::Malformed)?;
        if token == Token::Finish {
            break;
        }
        pass.step(token, &mut tokens, &mut sink)?;
    }
    sink.finish(&source).ok_or(EditError::NoRoom)
}

/// Which node below the root the pass is in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Section {
    Chosen,
    Reserved,
    Timer,
    Other,
}

struct Pass<'p, 'a> {
    plan: &'p Plan<'a>,
    source: Source<'p>,
    /// Nodes that are open; inside the root it is 1.
    depth: u32,
    section: Section,
    /// Cells of addresses and sizes in `/reserved-memory`, once that node has been seen.
    reserved: Option<(u32, u32)>,
}

impl Pass<'_, '_> {
    fn step(
        &mut self,
        token: Token<'_>,
        tokens: &mut Tokens<'_>,
        sink: &mut Sink<'_>,
    ) -> Result<(), EditError> {
        let fits = match token {
            Token::Begin(name) if self.drops_node(name) => {
                return tokens.skip_node().ok_or(EditError::Malformed);
            }
            Token::Begin(name) => {
                self.begin(name, sink).ok_or(EditError::NoRoom)?;
                if !self.copies_node() {
                    return Ok(());
                }
                let from = tokens.rest();
                tokens.skip_node().ok_or(EditError::Malformed)?;
                self.depth = self.depth.saturating_sub(1);
                sink.copy(from, tokens.rest())
            }
            Token::Property { name, value } => {
                if self.drops_property(name, value) {
                    Some(())
                } else {
                    sink.property_as(name, value)
                }
            }
            Token::End => self.end(sink),
            Token::Finish => Some(()),
        };
        fits.ok_or(EditError::NoRoom)
    }

    fn drops_node(&self, name: &[u8]) -> bool {
        let facts = &self.plan.facts;
        match (self.depth, self.section) {
            (1, _) => facts.dropped.contains(&name),
            (2, Section::Chosen) => facts.modules.iter().any(|module| module.name == name),
            _ => false,
        }
    }

    /// Whether everything in the node that has just begun stays as it is.
    fn copies_node(&self) -> bool {
        self.depth == 2 && self.section == Section::Other && !self.plan.facts.drops_smmu
    }

    /// Opens a node, and adds what the host needs to it: properties come before children.
    fn begin(&mut self, name: &[u8], sink: &mut Sink<'_>) -> Option<()> {
        sink.begin(name)?;
        self.depth = self.depth.checked_add(1)?;
        if self.depth != 2 {
            return Some(());
        }
        self.section = match name {
            b"chosen" => Section::Chosen,
            b"reserved-memory" => Section::Reserved,
            _ if name == self.plan.facts.timer.name => Section::Timer,
            _ => Section::Other,
        };
        match self.section {
            Section::Chosen => self.fill_chosen(sink),
            Section::Timer => {
                sink.property("interrupts", self.plan.facts.timer.physical)?;
                sink.property("interrupt-names", b"phys\0")
            }
            Section::Reserved => {
                self.reserved = Some(DEFAULT_CELLS);
                Some(())
            }
            Section::Other => Some(()),
        }
    }

    fn fill_chosen(&self, sink: &mut Sink<'_>) -> Option<()> {
        if let Some(arguments) = self.plan.arguments {
            sink.text_property("bootargs", arguments)?;
        }
        if let Some(ramdisk) = self.plan.ramdisk {
            sink.property("linux,initrd-start", &ramdisk.start().to_be_bytes())?;
            sink.property("linux,initrd-end", &ramdisk.end().to_be_bytes())?;
        }
        Some(())
    }

    /// Whether a property of the current node is left out; notes the cells of `/reserved-memory`.
    fn drops_property(&mut self, name_offset: u32, value: &[u8]) -> bool {
        let section = if self.depth == 2 { self.section } else { Section::Other };
        if section == Section::Other && !self.plan.facts.drops_smmu {
            return false;
        }
        let name = self.source.string(name_offset);
        let cells = || value.first_chunk().map(|bytes| u32::from_be_bytes(*bytes));
        match (section, name) {
            (Section::Chosen, name) if CHOSEN_ANEW.contains(&name) => true,
            (Section::Timer, name) if TIMER_ANEW.contains(&name) => true,
            (Section::Reserved, b"#address-cells") => {
                self.reserved = self.reserved.zip(cells()).map(|((_, size), address)| (address, size));
                false
            }
            (Section::Reserved, b"#size-cells") => {
                self.reserved = self.reserved.zip(cells()).map(|((address, _), size)| (address, size));
                false
            }
            _ => self.plan.facts.drops_smmu && SMMU_REFERENCES.contains(&name),
        }
    }

    /// Closes a node, with Deed's own memory as the last child of `/reserved-memory`, and that as the last
    /// child of the root if there was none.
    fn end(&mut self, sink: &mut Sink<'_>) -> Option<()> {
        match (self.depth, self.section) {
            (2, Section::Reserved) => self.add_deed(self.reserved?, sink)?,
            (1, _) if self.reserved.is_none() => {
                sink.begin(b"reserved-memory")?;
                sink.property("#address-cells", &OWN_CELLS.0.to_be_bytes())?;
                sink.property("#size-cells", &OWN_CELLS.1.to_be_bytes())?;
                sink.property("ranges", &[])?;
                self.add_deed(OWN_CELLS, sink)?;
                sink.end()?;
            }
            _ => {}
        }
        self.depth = self.depth.checked_sub(1)?;
        sink.end()
    }

    fn add_deed(&self, (address_cells, size_cells): (u32, u32), sink: &mut Sink<'_>) -> Option<()> {
        let deed = self.plan.deed;
        let mut name = ArrayString::<32>::new();
        write!(name, "deed@{:x}", deed.start()).ok()?;
        let mut reg = [0; 16];
        let mut length = 0usize;
        for (value, cells) in [(deed.start(), address_cells), (deed.size(), size_cells)] {
            let bytes = value.to_be_bytes();
            let bytes = match cells {
                1 if u32::try_from(value).is_ok() => bytes.get(4..)?,
                2 => &bytes,
                _ => return None,
            };
            let end = length.checked_add(bytes.len())?;
            reg.get_mut(length..end)?.copy_from_slice(bytes);
            length = end;
        }
        sink.begin(name.as_bytes())?;
        sink.property("reg", reg.get(..length)?)?;
        sink.property("no-map", &[])?;
        sink.end()
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{DEED, PHYSICAL_TIMER, RAMDISK, Sample};
    use super::*;
    use dtoolkit::fdt::Fdt;
    use dtoolkit::{Node, Property};

    /// The host's tree, read by a parser that had no part in writing it.
    fn edited<R>(sample: &Sample, read: impl FnOnce(Fdt<'_>) -> R) -> R {
        let blob = sample.blob();
        let plan = sample.plan(&blob).unwrap();
        let mut scratch = vec![0xaa; 0x1_0000];
        let length = write(&plan, &blob, &mut scratch).unwrap();
        read(Fdt::new(&scratch[..length]).unwrap())
    }

    fn value(fdt: Fdt<'_>, node: &str, property: &str) -> Option<Vec<u8>> {
        Some(fdt.find_node(node)?.property(property)?.value().to_vec())
    }

    #[test]
    fn the_host_finds_its_command_line_and_ramdisk_and_nothing_of_deeds() {
        edited(&Sample::default(), |fdt| {
            assert_eq!(value(fdt, "/chosen", "bootargs").unwrap(), b"console=ttyAMA0 quiet\0");
            assert_eq!(value(fdt, "/chosen", "stdout-path").unwrap(), b"/pl011@9000000\0");
            assert_eq!(value(fdt, "/chosen", "linux,initrd-start").unwrap(), RAMDISK.0.to_be_bytes());
            assert_eq!(
                value(fdt, "/chosen", "linux,initrd-end").unwrap(),
                (RAMDISK.0 + RAMDISK.1).to_be_bytes()
            );
            assert_eq!(fdt.find_node("/chosen").unwrap().children().count(), 0);
        });
    }

    #[test]
    fn the_nonce_is_in_no_byte_of_the_hosts_tree() {
        let sample = Sample::default();
        edited(&sample, |fdt| assert!(!fdt.data().windows(8).any(|window| window == b"00c0ffee")));
        assert!(sample.blob().windows(8).any(|window| window == b"00c0ffee"));
    }

    #[test]
    fn deeds_memory_is_a_no_map_node_in_a_new_or_an_old_parent() {
        let check = |fdt: Fdt<'_>| {
            let node = "/reserved-memory/deed@40200000";
            let expected = [DEED.0.to_be_bytes(), DEED.1.to_be_bytes()].concat();
            assert_eq!(value(fdt, node, "reg").unwrap(), expected);
            assert_eq!(value(fdt, node, "no-map").unwrap(), []);
        };
        edited(&Sample::default(), |fdt| {
            check(fdt);
            assert_eq!(value(fdt, "/reserved-memory", "#address-cells").unwrap(), 2u32.to_be_bytes());
            assert_eq!(value(fdt, "/reserved-memory", "#size-cells").unwrap(), 2u32.to_be_bytes());
            assert!(value(fdt, "/reserved-memory", "ranges").is_some());
        });
        edited(&Sample { reserved: vec![((0x5000_0000, 0x1000), true)], ..Sample::default() }, |fdt| {
            check(fdt);
            assert!(fdt.find_node("/reserved-memory/buffer@50000000").is_some());
            assert!(fdt.find_node("/reserved-memory/anywhere").is_some());
            let parents = fdt.root().children().filter(|node| node.name() == "reserved-memory");
            assert_eq!(parents.count(), 1);
        });
    }

    #[test]
    fn the_timer_is_the_physical_one_with_or_without_names() {
        for timer_names in [None, Some("sec-phys\0phys\0virt\0hyp-phys")] {
            edited(&Sample { timer_names, ..Sample::default() }, |fdt| {
                assert_eq!(value(fdt, "/timer", "interrupts").unwrap(), PHYSICAL_TIMER);
                assert_eq!(value(fdt, "/timer", "interrupt-names").unwrap(), b"phys\0");
                assert!(value(fdt, "/timer", "always-on").is_some());
            });
        }
    }

    #[test]
    fn devices_that_write_any_memory_are_gone_with_what_refers_to_them() {
        edited(&Sample { smmu: true, ..Sample::default() }, |fdt| {
            assert!(fdt.find_node("/fw-cfg@9020000").is_none());
            assert!(fdt.find_node("/smmuv3@9050000").is_none());
            assert_eq!(value(fdt, "/pcie@10000000", "iommu-map"), None);
            assert!(value(fdt, "/pcie@10000000", "device_type").is_some());
        });
        edited(&Sample::default(), |fdt| assert!(value(fdt, "/pcie@10000000", "iommu-map").is_some()));
    }

    #[test]
    fn reservations_and_all_other_nodes_stay_as_they_are() {
        let sample = Sample { reservations: vec![(0x6000_0000, 0x1000)], ..Sample::default() };
        edited(&sample, |fdt| {
            let kept: Vec<_> = fdt.memory_reservations().map(|r| (r.address(), r.size())).collect();
            assert_eq!(kept, sample.reservations);
            let old = sample.blob();
            let old = Fdt::new(&old).unwrap();
            for node in ["/memory@40000000", "/intc@8000000", "/pcie@10000000"] {
                assert_eq!(
                    fdt.find_node(node).unwrap().to_string(),
                    old.find_node(node).unwrap().to_string(),
                    "{node}"
                );
            }
        });
    }

    #[test]
    fn a_host_without_command_line_or_ramdisk_gets_neither() {
        let modules = vec![("multiboot,kernel", super::super::sample::HOST, None)];
        edited(&Sample { modules, ..Sample::default() }, |fdt| {
            assert_eq!(value(fdt, "/chosen", "bootargs"), None);
            assert_eq!(value(fdt, "/chosen", "linux,initrd-start"), None);
        });
    }

    #[test]
    fn a_scratch_buffer_of_any_smaller_size_is_reported() {
        let sample = Sample::default();
        let blob = sample.blob();
        let plan = sample.plan(&blob).unwrap();
        let mut scratch = vec![0; 0x1_0000];
        let length = write(&plan, &blob, &mut scratch).unwrap();
        for size in 0..length {
            assert_eq!(write(&plan, &blob, &mut scratch[..size]), Err(EditError::NoRoom), "{size}");
        }
        assert_eq!(write(&plan, &blob, &mut scratch[..length]), Ok(length));
    }

    /// Names that Deed adds follow the old ones: a property that had no name must not find one there.
    #[test]
    fn a_property_whose_name_is_not_in_the_tree_is_refused() {
        let sample = Sample::default();
        let mut blob = sample.blob();
        let word = |blob: &[u8], at: usize| u32::from_be_bytes(*blob[at..].first_chunk().unwrap());
        let strings_size = word(&blob, 32);
        let property = [3u32.to_be_bytes(), 0u32.to_be_bytes()].concat();
        let at = blob.windows(8).position(|bytes| bytes == property).unwrap() + 8;
        let [_, last] = [strings_size, strings_size - 1].map(|name| {
            blob[at..at + 4].copy_from_slice(&name.to_be_bytes());
            sample.plan(&blob).map(|_| ())
        });
        assert_eq!(last, Ok(()), "the last name, which is empty");
        blob[at..at + 4].copy_from_slice(&strings_size.to_be_bytes());
        assert_eq!(sample.plan(&blob).unwrap_err(), Problem::Tree(TreeError::Malformed));

        let mut blob = sample.blob();
        blob[32..36].copy_from_slice(&(strings_size - 1).to_be_bytes());
        assert_eq!(
            sample.plan(&blob).unwrap_err(),
            Problem::Tree(TreeError::Malformed),
            "the last name has no end"
        );
    }

    #[test]
    fn a_damaged_tree_is_an_error_and_never_a_panic() {
        let sample = Sample {
            smmu: true,
            reserved: vec![((0x5000_0000, 0x1000), true)],
            total: 0,
            ..Sample::default()
        };
        let blob = sample.blob();
        let mut scratch = vec![0; 0x1_0000];
        let mut booted = 0;
        for at in 0..blob.len() {
            for change in [0x01, 0x80, 0xff] {
                let mut damaged = blob.clone();
                damaged[at] ^= change;
                if let Ok(plan) = sample.plan(&damaged) {
                    booted += 1;
                    let _ = write(&plan, &damaged, &mut scratch);
                }
            }
        }
        assert!(booted > 0);
        for length in 1..blob.len() {
            assert!(sample.plan(&blob[..length]).is_err(), "{length}");
        }
    }
}
