// Where the threads of a block or of a cluster meet.
#include "group.h"

namespace simt {

void sync_block(Place place) {
  Block& block = *current->block;
  for (int i = 0; i < block.thread_count && block.at_barrier > 0; ++i) {
    const Thread& other = *block.threads[i];
    if (other.state != State::at_barrier) continue;
    if (other.place.line != place.line) {
      fault("divergent barrier: a thread at %s:%d, another at %s:%d", place.file, place.line,
            other.place.file, other.place.line);
    }
    break;
  }
  progress();
  current->state = State::at_barrier;
  current->place = place;
  if (++block.at_barrier == block.thread_count) {
    block.at_barrier = 0;
    std::vector<Clock*> clocks;
    for (int i = 0; i < block.thread_count; ++i) {
      wake(*block.threads[i]);
      clocks.push_back(&block.threads[i]->clock);
    }
    meet(clocks);
  }
  wait();
}

void cluster_arrive(Place place) {
  Thread& self = *current;
  Cluster& cluster = *self.block->cluster;
  if (self.arrived) {
    fault("a thread arrives at the cluster's barrier at %s:%d again, without a wait between",
          place.file, place.line);
  }
  Warp& warp = self.block->warps[static_cast<size_t>(self.linear / kWarp)];
  if (warp.round == cluster.round && warp.arrival.line != place.line) {
    fault("threads of a warp arrive apart at the cluster's barrier: at %s:%d and %s:%d",
          warp.arrival.file, warp.arrival.line, place.file, place.line);
  }
  warp.round = cluster.round;
  warp.arrival = place;
  self.arrived = true;
  self.round = cluster.round;
  progress();
  cluster.released.push_back(release(self.clock));
  if (++cluster.arrived == cluster.threads) {
    cluster.known = merge(cluster.released);
    cluster.released.clear();
    cluster.arrived = 0;
    ++cluster.round;
    for (Thread* thread : cluster.waiting) wake(*thread);
    cluster.waiting.clear();
  }
  yield();
}

void cluster_wait(Place place) {
  Thread& self = *current;
  Cluster& cluster = *self.block->cluster;
  if (!self.arrived) {
    fault("a thread waits for the cluster at %s:%d without having arrived", place.file, place.line);
  }
  self.arrived = false;
  progress();
  if (self.round != cluster.round) {
    yield();
  } else {
    self.state = State::at_cluster_barrier;
    self.place = place;
    cluster.waiting.push_back(&self);
    wait();
  }
  acquire(self.clock, cluster.known);
}

unsigned cluster_rank() { return current->block->rank; }

unsigned cluster_size() { return static_cast<unsigned>(current->block->cluster->blocks.size()); }

}  // namespace simt
