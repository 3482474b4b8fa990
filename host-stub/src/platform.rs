//! What the device tree says of the machine.
//!
//! Read before there is a heap, so everything has a fixed capacity; what does not fit is an error, since
//! memory that is silently forgotten might be memory that is not the kernel's.

use core::ops::Range;

use arrayvec::ArrayVec;
use dtoolkit::fdt::{Fdt, FdtNode};
use dtoolkit::standard::NodeStandard;
use dtoolkit::{Node, Property};

use crate::mm::{PAGE, page_down, page_up};
use crate::secondary::MAX_CPUS;

const MAX_RANGES: usize = 32;

/// Ranges of physical addresses.
pub type Ranges = ArrayVec<Range<u64>, MAX_RANGES>;

/// Why a device tree cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlatformError {
    /// It is no device tree.
    Malformed,
    /// It names no memory.
    NoMemory,
    /// It names more ranges than there is room for.
    TooMany,
}

/// How PSCI is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conduit {
    /// `SMC #0`.
    Smc,
    /// `HVC #0`: there is firmware at EL2, and no Deed.
    Hvc,
}

/// The interrupt controller's registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gic {
    /// Distributor.
    pub distributor: u64,
    /// First redistributor region: base and size.
    pub redistributors: (u64, u64),
}

/// The machine.
#[derive(Clone, Debug)]
pub struct Platform<'a> {
    /// RAM, in whole pages.
    pub ram: Ranges,
    /// Parts of it that are not the kernel's to give away: reserved ranges, the ramdisk.
    pub reserved: Ranges,
    /// The ramdisk.
    pub initrd: Option<Range<u64>>,
    /// The kernel's command line.
    pub bootargs: &'a str,
    /// How PSCI is called, if there is any.
    pub psci: Option<Conduit>,
    /// PL011.
    pub uart: Option<u64>,
    /// GICv3.
    pub gic: Option<Gic>,
    /// Affinities of the CPUs.
    pub cpus: ArrayVec<u64, MAX_CPUS>,
}

impl<'a> Platform<'a> {
    /// Reads a device tree.
    pub fn read(tree: &'a [u8]) -> Result<Self, PlatformError> {
        let fdt = Fdt::new(tree).map_err(|_| PlatformError::Malformed)?;
        let root = fdt.root();
        let mut platform = Self {
            ram: Ranges::new(),
            reserved: Ranges::new(),
            initrd: None,
            bootargs: "",
            psci: None,
            uart: None,
            gic: None,
            cpus: ArrayVec::new(),
        };
        for node in root.children() {
            if text(&node, "device_type") == Some("memory") {
                for (address, size) in registers(node) {
                    push(&mut platform.ram, inner(address, size))?;
                }
            }
        }
        if platform.ram.is_empty() {
            return Err(PlatformError::NoMemory);
        }
        for reservation in fdt.memory_reservations() {
            push(&mut platform.reserved, outer(reservation.address(), reservation.size()))?;
        }
        if let Some(reserved) = fdt.find_node("/reserved-memory") {
            for (address, size) in reserved.children().flat_map(registers) {
                push(&mut platform.reserved, outer(address, size))?;
            }
        }
        if let Some(chosen) = fdt.find_node("/chosen") {
            platform.bootargs = text(&chosen, "bootargs").unwrap_or("");
            let ends = (number(&chosen, "linux,initrd-start"), number(&chosen, "linux,initrd-end"));
            if let (Some(start), Some(end)) = ends
                && start < end
            {
                platform.initrd = Some(start..end);
                push(&mut platform.reserved, outer(start, end.saturating_sub(start)))?;
            }
        }
        if let Some(cpus) = fdt.find_node("/cpus") {
            let named = cpus.children().filter(|node| text(node, "device_type") == Some("cpu"));
            // CPUs beyond those that the kernel has room for stay off.
            platform.cpus.extend(named.filter_map(|node| number(&node, "reg")).take(MAX_CPUS));
        }
        platform.find_devices(root, 0);
        Ok(platform)
    }

    /// Looks through the tree for what the kernel drives; the depth is bounded.
    fn find_devices(&mut self, node: FdtNode<'a>, depth: u32) {
        if node.is_compatible("arm,pl011") && self.uart.is_none() {
            self.uart = registers(node).next().map(|(address, _)| address);
        }
        if node.is_compatible("arm,gic-v3") {
            let mut registers = registers(node);
            if let (Some((distributor, _)), Some(redistributors)) = (registers.next(), registers.next()) {
                self.gic = Some(Gic { distributor, redistributors });
            }
        }
        if node.is_compatible("arm,psci-0.2") || node.is_compatible("arm,psci-1.0") {
            self.psci = match text(&node, "method") {
                Some("smc") => Some(Conduit::Smc),
                Some("hvc") => Some(Conduit::Hvc),
                _ => None,
            };
        }
        if depth < 2 {
            for child in node.children() {
                self.find_devices(child, depth.saturating_add(1));
            }
        }
    }

    /// The value of `key=value` on the command line, before ` -- `.
    pub fn option(&self, key: &str) -> Option<&'a str> {
        let options = self.bootargs.split(" -- ").next().unwrap_or("");
        options.split_ascii_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    }

    /// The words behind ` -- `: the first program's arguments.
    pub fn program_arguments(&self) -> impl Iterator<Item = &'a str> {
        let rest = self.bootargs.split_once("-- ").map_or("", |(_, rest)| rest);
        rest.split_ascii_whitespace()
    }

    /// Finds `size` bytes of RAM, 2 MiB aligned, that are not reserved, and reserves them.
    pub fn carve(&mut self, size: u64) -> Option<Range<u64>> {
        const ALIGN: u64 = 2 << 20;
        let fits = |start: u64| {
            let end = start.checked_add(size)?;
            let clash = self.reserved.iter().find(|range| range.start < end && start < range.end);
            Some((start..end, clash.cloned()))
        };
        for ram in &self.ram {
            let mut start = ram.start.checked_next_multiple_of(ALIGN)?;
            while let Some((range, clash)) = fits(start).filter(|(range, _)| range.end <= ram.end) {
                match clash {
                    None => {
                        push(&mut self.reserved, range.clone()).ok()?;
                        return Some(range);
                    }
                    Some(clash) => start = clash.end.checked_next_multiple_of(ALIGN)?,
                }
            }
        }
        None
    }
}

fn push(ranges: &mut Ranges, range: Range<u64>) -> Result<(), PlatformError> {
    if range.start < range.end { ranges.try_push(range).map_err(|_| PlatformError::TooMany) } else { Ok(()) }
}

/// The whole pages in a range.
fn inner(address: u64, size: u64) -> Range<u64> {
    page_up(address).unwrap_or(u64::MAX)..page_down(address.saturating_add(size))
}

/// The pages that a range touches.
fn outer(address: u64, size: u64) -> Range<u64> {
    page_down(address)..page_up(address.saturating_add(size)).unwrap_or(!(PAGE - 1))
}

fn registers<'a>(node: FdtNode<'a>) -> impl Iterator<Item = (u64, u64)> + 'a {
    node.reg()
        .ok()
        .flatten()
        .into_iter()
        .flatten()
        .filter_map(|reg| Some((reg.address().ok()?, reg.size().ok()?)))
}

fn text<'a>(node: &FdtNode<'a>, name: &str) -> Option<&'a str> {
    node.properties().find(|property| property.name() == name)?.value_as().ok()
}

/// A number of one or two cells.
fn number(node: &FdtNode<'_>, name: &str) -> Option<u64> {
    let property = node.properties().find(|property| property.name() == name)?;
    match *property.value() {
        [a, b, c, d] => Some(u32::from_be_bytes([a, b, c, d]).into()),
        [a, b, c, d, e, f, g, h] => Some(u64::from_be_bytes([a, b, c, d, e, f, g, h])),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(bootargs: &str) -> Platform<'_> {
        Platform {
            ram: core::iter::once(0x4000_0000..0x4800_0000).collect(),
            reserved: [0x4000_0000..0x4010_0000, 0x4020_0000..0x4060_0000].into_iter().collect(),
            initrd: None,
            bootargs,
            psci: None,
            uart: None,
            gic: None,
            cpus: ArrayVec::new(),
        }
    }

    #[test]
    fn options_and_arguments_are_told_apart() {
        let platform = platform("init=/bin/probe quiet -- -v init=no");
        assert_eq!(platform.option("init"), Some("/bin/probe"));
        assert_eq!(platform.option("quiet"), None);
        let arguments: ArrayVec<_, 4> = platform.program_arguments().collect();
        assert_eq!(arguments.as_slice(), ["-v", "init=no"]);
    }

    #[test]
    fn carving_steps_over_what_is_reserved_and_reserves_what_it_took() {
        let mut platform = platform("");
        assert_eq!(platform.carve(0x20_0000), Some(0x4060_0000..0x4080_0000));
        assert_eq!(platform.carve(0x40_0000), Some(0x4080_0000..0x40c0_0000));
        assert_eq!(platform.carve(0x1000_0000), None);
    }

    #[test]
    fn rubbish_is_no_device_tree() {
        assert_eq!(Platform::read(&[0; 64]).err(), Some(PlatformError::Malformed));
    }
}
